#if canImport(CoreML)
import CoreML
import Foundation

/// Core ML with the caches as model state. Predictions must not overlap, so each conversation has its own engine.
///
/// A model is one package or several that run one after the other, each for consecutive layers.
@available(iOS 18, macOS 15, *)
public final class CoreMLEngine: Engine, @unchecked Sendable {
    public let givesEveryRow = false
    public let computeUnits: ComputeUnits?
    public let runtime = partOfSystem("Core ML")

    private let manifest: Manifest
    private let tables: [TensorRole: EmbeddingTable]
    private let parts: [Part]

    /// Compiles the bundle's packages unless compiled models are cached, and loads their two functions.
    public init(_ bundle: ModelBundle, units: ComputeUnits) async throws {
        manifest = bundle.manifest
        let graphs = try coreMLParts(manifest)
        tables = try openTables(bundle, graphs[0].decode)
        let used = units.used(for: graphs[0].decode)
        computeUnits = used
        do {
            var parts: [Part] = []
            for graph in graphs { parts.append(try await Part(bundle, graph, used)) }
            self.parts = parts
        } catch let error as GemmaError {
            throw error
        } catch {
            let choice = units == .automatic ? "" : ", or choose other compute units than \"\(units.title)\""
            throw GemmaError.session(
                "Core ML can't load the model: \(error.localizedDescription); copy the bundle again\(choice)")
        }
    }

    public func run(_ tokens: [Int], position: Int, rows: Int) throws -> [[Float]] {
        try runtimeCall("Core ML can't run the model") { [try logits(tokens, position)] }
    }

    private func logits(_ tokens: [Int], _ position: Int) throws -> [Float] {
        let isSingle = tokens.count == 1
        let chunk = CoreMLInputs(position: position, count: tokens.count, length: isSingle ? 1 : manifest.prefillLength)
        var result: MLMultiArray?
        for part in parts {
            let graph = isSingle ? part.graphs.decode : part.graphs.prefill
            var features: [String: Any] = [:]
            for spec in graph.inputs {
                features[spec.name] = spec.role == .hidden ? result : try array(spec, chunk, tokens)
            }
            result = try part.run(features, graph, isSingle: isSingle)
        }
        guard let result else { throw GemmaError.session("the model returns no logits; export the model again") }
        return MLShapedArray<Float16>(result).scalars.map(Float.init)
    }

    private func array(_ spec: TensorSpec, _ chunk: CoreMLInputs, _ tokens: [Int]) throws -> MLMultiArray {
        switch try chunk.value(of: spec, tokens: tokens, manifest: manifest, tables: tables) {
        case .integers(let values):
            return MLMultiArray(MLShapedArray<Int32>(scalars: values.map(Int32.init), shape: [values.count]))
        case .halves(let rows):
            let halves = rows.joined().map { Float16($0) }
            return MLMultiArray(MLShapedArray<Float16>(scalars: halves, shape: [rows.count, rows[0].count]))
        }
    }
}

/// One package, with its two functions and their common state.
@available(iOS 18, macOS 15, *)
private struct Part {
    let graphs: CoreMLPart
    private let prefill: MLModel
    private let decode: MLModel
    private let state: MLState

    init(_ bundle: ModelBundle, _ graphs: CoreMLPart, _ units: ComputeUnits) async throws {
        self.graphs = graphs
        let package = bundle.directory.appendingPathComponent(graphs.decode.file).deletingLastPathComponent()
        let compiled = try await compiledModel(package, bundle.manifest.artifactDigest)
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units.coreML
        configuration.functionName = "prefill"
        prefill = try MLModel(contentsOf: compiled, configuration: configuration)
        configuration.functionName = "decode"
        decode = try MLModel(contentsOf: compiled, configuration: configuration)
        state = decode.makeState()
    }

    /// The package's one output: logits, or the hidden states for the next package.
    func run(_ features: [String: Any], _ graph: Graph, isSingle: Bool) throws -> MLMultiArray? {
        let inputs = try MLDictionaryFeatureProvider(dictionary: features)
        let output = try (isSingle ? decode : prefill).prediction(from: inputs, using: state)
        return graph.outputs.first.flatMap { output.featureValue(for: $0.name)?.multiArrayValue }
    }
}

extension ComputeUnits {
    fileprivate var coreML: MLComputeUnits {
        switch self {
        case .automatic, .all: .all
        case .cpuOnly: .cpuOnly
        case .cpuAndNeuralEngine: .cpuAndNeuralEngine
        case .cpuAndGPU: .cpuAndGPU
        }
    }
}

/// The compiled model. Compiling is slow, so the result is cached by the digest of all the artifact's files: the same
/// codes with another context length are another model.
private func compiledModel(_ package: URL, _ digest: String) async throws -> URL {
    let folder = compiledModels.appendingPathComponent(digest)
    let name = package.deletingPathExtension().lastPathComponent
    let cached = folder.appendingPathComponent("\(name).mlmodelc")
    if FileManager.default.fileExists(atPath: cached.path) { return cached }
    let compiled = try await MLModel.compileModel(at: package)
    try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    try FileManager.default.moveItem(at: compiled, to: cached)
    return cached
}
#endif
