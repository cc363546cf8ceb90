#if canImport(CoreML)
import CoreML
import Foundation

/// Core ML with the caches in its states. One engine per conversation: predictions never overlap.
@available(iOS 18, macOS 15, *)
public final class CoreMLEngine: Engine {
    public let givesEveryRow = false

    private let manifest: Manifest
    private let prefill: MLModel
    private let decode: MLModel
    private let state: MLState
    private let graphs: (prefill: Graph, decode: Graph)

    /// Compiles the bundle's package where that was not done before, and loads its two functions.
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
            let given = try MLDictionaryFeatureProvider(dictionary: features(graph, tokens, chunk))
            let output = try (single ? decode : prefill).prediction(from: given, using: state)
            guard let logits = output.featureValue(for: try graph.tensor(.logits).name)?.multiArrayValue else {
                throw GemmaError.session("the model gives no logits; export it again")
            }
            return [MLShapedArray<Float16>(logits).scalars.map(Float.init)]
        } catch let error as GemmaError {
            throw error
        } catch {
            throw GemmaError.session("Core ML can't run the model: \(error.localizedDescription); start a new chat")
        }
    }

    private func features(_ graph: Graph, _ tokens: [Int], _ chunk: CoreMLInputs) throws -> [String: Any] {
        var found: [String: Any] = [:]
        for spec in graph.inputs {
            switch try chunk.value(of: spec, tokens: tokens, manifest: manifest) {
            case .integers(let values): found[spec.name] = integers(values)
            case .halves(let rows): found[spec.name] = halves(rows)
            }
        }
        return found
    }
}

/// This engine runs one package that looks its embeddings up itself.
private func checkLayout(_ manifest: Manifest) throws {
    let parts = manifest.graphs["decode"] ?? []
    let roles = Set(parts.flatMap(\.inputs).map(\.role))
    guard parts.count == 1 && roles.isSuperset(of: [.tokens, .slots]) else {
        throw GemmaError.session(
            "this app runs packages of --coreml-compute gpu with the embedding inside; export the model again so")
    }
}

@available(iOS 18, macOS 15, *)
private func loadFunction(_ name: String, _ compiled: URL) throws -> MLModel {
    let configuration = MLModelConfiguration()
    configuration.functionName = name
    return try MLModel(contentsOf: compiled, configuration: configuration)
}

/// The compiled model, kept by the digest of all its files, since compiling takes a while: the same codes at another
/// context are another model.
private func compiledModel(_ package: URL, _ digest: String) async throws -> URL {
    let caches = try FileManager.default.url(for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
    let kept = caches.appendingPathComponent("\(digest).mlmodelc")
    if FileManager.default.fileExists(atPath: kept.path) { return kept }
    let compiled = try await MLModel.compileModel(at: package)
    try FileManager.default.moveItem(at: compiled, to: kept)
    return kept
}

private func integers(_ values: [Int]) -> MLMultiArray {
    let array = MLShapedArray<Int32>(scalars: values.map(Int32.init), shape: [values.count])
    return MLMultiArray(array)
}

private func halves(_ rows: [[Double]]) -> MLMultiArray {
    MLMultiArray(MLShapedArray<Float16>(scalars: rows.joined().map(Float16.init), shape: [rows.count, rows[0].count]))
}
#endif
