#if canImport(CoreML)
import CoreML
import Foundation

/// Core ML with the caches as model state. Predictions must not overlap, so each conversation has its own engine.
@available(iOS 18, macOS 15, *)
public final class CoreMLEngine: Engine {
    public let givesEveryRow = false

    private let manifest: Manifest
    private let prefill: MLModel
    private let decode: MLModel
    private let state: MLState
    private let graphs: (prefill: Graph, decode: Graph)

    /// Compiles the bundle's package unless a compiled model is cached, and loads its two functions.
    public init(_ bundle: ModelBundle) async throws {
        manifest = bundle.manifest
        try checkLayout(manifest)
        graphs = (try bundle.graph("prefill"), try bundle.graph("decode"))
        let package = bundle.directory.appendingPathComponent(graphs.decode.file).deletingLastPathComponent()
        do {
            let compiled = try await compiledModel(package, manifest.artifactDigest)
            prefill = try loadFunction("prefill", compiled)
            decode = try loadFunction("decode", compiled)
            state = decode.makeState()
        } catch let error as GemmaError {
            throw error
        } catch {
            throw GemmaError.session("Core ML can't load the model: \(error.localizedDescription); copy the bundle again")
        }
    }

    public func run(_ tokens: [Int], position: Int, rows: Int) throws -> [[Float]] {
        let single = tokens.count == 1
        let chunk = CoreMLInputs(position: position, count: tokens.count, length: single ? 1 : manifest.prefillLength)
        let graph = single ? graphs.decode : graphs.prefill
        do {
            let inputs = try MLDictionaryFeatureProvider(dictionary: features(graph, tokens, chunk))
            let output = try (single ? decode : prefill).prediction(from: inputs, using: state)
            guard let logits = output.featureValue(for: try graph.tensor(.logits).name)?.multiArrayValue else {
                throw GemmaError.session("the model returns no logits; export the model again")
            }
            return [MLShapedArray<Float16>(logits).scalars.map(Float.init)]
        } catch let error as GemmaError {
            throw error
        } catch {
            throw GemmaError.session("Core ML can't run the model: \(error.localizedDescription); start a new chat")
        }
    }

    private func features(_ graph: Graph, _ tokens: [Int], _ chunk: CoreMLInputs) throws -> [String: Any] {
        var features: [String: Any] = [:]
        for spec in graph.inputs {
            switch try chunk.value(of: spec, tokens: tokens, manifest: manifest) {
            case .integers(let values): features[spec.name] = integers(values)
            case .halves(let rows): features[spec.name] = halves(rows)
            }
        }
        return features
    }
}

/// Throws unless the model is one package that contains its embedding table.
private func checkLayout(_ manifest: Manifest) throws {
    let parts = manifest.graphs["decode"] ?? []
    let roles = Set(parts.flatMap(\.inputs).map(\.role))
    guard parts.count == 1 && roles.isSuperset(of: [.tokens, .slots]) else {
        throw GemmaError.session(
            "this app runs only packages of --coreml-compute gpu that contain the embedding table; export the model again")
    }
}

@available(iOS 18, macOS 15, *)
private func loadFunction(_ name: String, _ compiled: URL) throws -> MLModel {
    let configuration = MLModelConfiguration()
    configuration.functionName = name
    return try MLModel(contentsOf: compiled, configuration: configuration)
}

/// The compiled model. Compiling is slow, so the result is cached by the digest of all the artifact's files: the same
/// codes with another context length are another model.
private func compiledModel(_ package: URL, _ digest: String) async throws -> URL {
    let caches = try FileManager.default.url(for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
    let cached = caches.appendingPathComponent("\(digest).mlmodelc")
    if FileManager.default.fileExists(atPath: cached.path) { return cached }
    let compiled = try await MLModel.compileModel(at: package)
    try FileManager.default.moveItem(at: compiled, to: cached)
    return cached
}

private func integers(_ values: [Int]) -> MLMultiArray {
    let array = MLShapedArray<Int32>(scalars: values.map(Int32.init), shape: [values.count])
    return MLMultiArray(array)
}

private func halves(_ rows: [[Double]]) -> MLMultiArray {
    MLMultiArray(MLShapedArray<Float16>(scalars: rows.joined().map(Float16.init), shape: [rows.count, rows[0].count]))
}
#endif
