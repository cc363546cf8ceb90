/// Opens one of a bundle's graphs, to run on these units if its runtime has a choice of them.
public typealias EngineOpener =
    @Sendable (_ bundle: ModelBundle, _ graph: String, _ units: ComputeUnits) async throws -> any Engine

/// Opens a graph with the backend for the bundle's target.
@Sendable
public func openEngine(_ bundle: ModelBundle, graph: String, units: ComputeUnits) async throws -> any Engine {
    switch bundle.manifest.target {
    #if canImport(CoreML)
    case "coreml" where graph == "decode": return try await CoreMLEngine(bundle, units: units)
    #endif
    case "coreai" where graph == "decode": return try await openCoreAI(bundle, units)
    case let target:
        throw GemmaError.session(
            "the bundle's \(graph) graph is for \(target), which this app cannot run; export with --target coreml, "
                + "or build the app with ExecuTorch as its README says")
    }
}

private func openCoreAI(_ bundle: ModelBundle, _ units: ComputeUnits) async throws -> any Engine {
    #if canImport(CoreAI)
    if #available(iOS 27, macOS 27, *) { return try await CoreAIEngine(bundle, units: units) }
    throw GemmaError.session(
        "the bundle is for Core AI, which begins with iOS 27; update the system, or export with --target coreml")
    #else
    throw GemmaError.session(
        "the bundle is for Core AI, which this app was built without; build it with Xcode 27, or export with --target coreml")
    #endif
}

/// Throws a session error if a bundle needs a newer runtime than this app has.
public func checkRuntime(_ manifest: Manifest, _ name: String, _ version: String) throws {
    guard isVersion(version, atLeast: manifest.minRuntimeVersion) else {
        throw GemmaError.session(
            "the bundle needs \(name) \(manifest.minRuntimeVersion) or newer, this app has \(version); update the app")
    }
}

/// Compares versions by their numbers: 1.10 is newer than 1.9.
func isVersion(_ version: String, atLeast least: String) -> Bool {
    func numbers(_ text: String) -> [Int] { text.split(separator: ".").map { Int($0.prefix { $0.isNumber }) ?? 0 } }
    let (have, need) = (numbers(version), numbers(least))
    for index in 0..<max(have.count, need.count) {
        let (left, right) = (index < have.count ? have[index] : 0, index < need.count ? need[index] : 0)
        if left != right { return left > right }
    }
    return true
}
