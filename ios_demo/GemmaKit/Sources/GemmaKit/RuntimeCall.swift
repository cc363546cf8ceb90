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
#endif
