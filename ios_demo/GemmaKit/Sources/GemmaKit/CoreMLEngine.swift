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
    private let states: [String: [Int?]]  // shape by name

    /// Compiles the bundle's package unless a compiled model is cached, and loads its two functions.
    public init(_ bundle: ModelBundle) async throws {
        manifest = bundle.manifest
        guard let graph = manifest.graphs["decode"] else {
            throw GemmaError.session("the bundle has no decode graph; export the model again")
        }
        try checkLayout(graph, manifest)
        states = Dictionary(uniqueKeysWithValues: graph.states.map { ($0.name, $0.shape) })
        let package = bundle.directory.appendingPathComponent(graph.file).deletingLastPathComponent()
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
        do {
            let inputs = try MLDictionaryFeatureProvider(dictionary: features(tokens, chunk))
            let output = try (single ? decode : prefill).prediction(from: inputs, using: state)
            guard let logits = output.featureValue(for: "logits")?.multiArrayValue else {
                throw GemmaError.session("the model returns no logits; export the model again")
            }
            return [MLShapedArray<Float16>(logits).scalars.map(Float.init)]
        } catch let error as GemmaError {
            throw error
        } catch {
            throw GemmaError.session("Core ML can't run the model: \(error.localizedDescription); start a new chat")
        }
    }

    private func features(_ tokens: [Int], _ chunk: CoreMLInputs) throws -> [String: Any] {
        var features: [String: Any] = [
            "tokens": integers(padded(tokens, chunk.length)),
            "last": integers([tokens.count - 1]),
        ]
        for kind in [AttentionKind.local, .global] {
            guard let cache = manifest.layers.first(where: { $0.kind == kind }) else { continue }
            guard let rope = manifest.ropes[kind.rawValue] else {
                throw GemmaError.session("the manifest has no rope for \(kind.rawValue) layers; export the model again")
            }
            let angles = chunk.angles(rope, cache)
            features["\(kind.rawValue)_cos"] = halves(angles.map { $0.map { Float16(cos($0)) } })
            features["\(kind.rawValue)_sin"] = halves(angles.map { $0.map { Float16(sin($0)) } })
            features["\(kind.rawValue)_slots"] = integers(chunk.slots(cache))
            let seen = chunk.seen(cache, columns: try columns(cache, chunk))
            features["\(kind.rawValue)_mask"] = halves(seen.map { $0.map { $0 ? Float16(0) : hidden } })
        }
        return features
    }

    private func columns(_ cache: LayerCache, _ chunk: CoreMLInputs) throws -> Int {
        if cache.kind == .local { return cache.slots + chunk.length }
        guard let shape = states["global_cache"], shape.count > 1, let rows = shape[1] else {
            throw GemmaError.session("the manifest has no shape for global_cache; export the model again")
        }
        return rows
    }
}

/// Throws unless the model is one package that contains its embedding table.
private func checkLayout(_ graph: Graph, _ manifest: Manifest) throws {
    let isWhole = manifest.graphs["decode-2"] == nil && graph.inputs.contains { $0.name == "tokens" }
    guard isWhole && graph.inputs.contains(where: { $0.name.hasSuffix("_slots") }) else {
        throw GemmaError.session(
            "this app runs only packages of --coreml-compute gpu that contain the embedding table; export the model again")
    }
}

/// Far below any attention score and within float16; not every Apple compute unit handles -inf.
private let hidden: Float16 = -4e4

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

private func padded(_ values: [Int], _ length: Int) -> [Int] {
    values + [Int](repeating: 0, count: length - values.count)
}

private func integers(_ values: [Int]) -> MLMultiArray {
    let array = MLShapedArray<Int32>(scalars: values.map(Int32.init), shape: [values.count])
    return MLMultiArray(array)
}

private func halves(_ rows: [[Float16]]) -> MLMultiArray {
    MLMultiArray(MLShapedArray<Float16>(scalars: rows.flatMap { $0 }, shape: [rows.count, rows[0].count]))
}
#endif
