#if canImport(CoreML)
import CoreML
import Foundation

/// Calls a runtime. Its own errors become one line that begins with `failure`, e.g. `Core ML can't run the model`.
///
/// Without a pool, what it allocates for all tokens would stay until the reply ends.
public func runtimeCall<T>(_ failure: String, _ work: () throws -> T) throws -> T {
    try autoreleasepool {
        do {
            return try work()
        } catch let error as GemmaError {
            throw error
        } catch {
            throw GemmaError.session("\(failure): \(error.localizedDescription); start a new chat")
        }
    }
}

/// A runtime that comes with the system and has no version of its own, such as `Core ML of 18.5.0`.
func partOfSystem(_ name: String) -> String {
    let version = ProcessInfo.processInfo.operatingSystemVersion
    return "\(name) of \(version.majorVersion).\(version.minorVersion).\(version.patchVersion)"
}
#endif
