/// Opens one of a bundle's graphs.
public typealias EngineOpener = @Sendable (_ bundle: ModelBundle, _ graph: String) async throws -> Engine

/// Opens a graph with the backend for the bundle's target.
@Sendable
public func openEngine(_ bundle: ModelBundle, graph: String) async throws -> Engine {
    switch bundle.manifest.target {
    #if canImport(CoreML)
    case "coreml" where graph == "decode": return try await CoreMLEngine(bundle)
    #endif
    #if canImport(ExecuTorch)
    case "executorch": return try ExecutorchEngine(bundle, graph: graph)
    #endif
    case let target:
        throw GemmaError.session(
            "the bundle's \(graph) graph is for \(target), which this app cannot run; export with --target coreml")
    }
}
