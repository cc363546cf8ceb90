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
    private let states: [String: [Int?]]  // shape by name

    /// Compiles the bundle's package where that was not done before, and loads its two functions.
    public init(_ bundle: ModelBundle) async throws {
        manifest = bundle.manifest
        guard let graph = manifest.graphs["decode"] else {
            throw GemmaError.session("the bundle holds no decode graph; export the model again")
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
            let given = try MLDictionaryFeatureProvider(dictionary: features(tokens, chunk))
            let output = try (single ? decode : prefill).prediction(from: given, using: state)
            guard let logits = output.featureValue(for: "logits")?.multiArrayValue else {
                throw GemmaError.session("the model gives no logits; export it again")
            }
            return [MLShapedArray<Float16>(logits).scalars.map(Float.init)]
        } catch let error as GemmaError {
            throw error
        } catch {
            throw GemmaError.session("Core ML can't run the model: \(error.localizedDescription); start a new chat")
        }
    }

    private func features(_ tokens: [Int], _ chunk: CoreMLInputs) throws -> [String: Any] {
        var found: [String: Any] = [
            "tokens": integers(padded(tokens, chunk.length)),
            "last": integers([tokens.count - 1]),
        ]
        for kind in [AttentionKind.local, .global] {
            guard let cache = manifest.layers.first(where: { $0.kind == kind }) else { continue }
            guard let rope = manifest.ropes[kind.rawValue] else {
                throw GemmaError.session("the manifest tells no rope of \(kind.rawValue) layers; export the model again")
            }
            let angles = chunk.angles(rope, cache)
            found["\(kind.rawValue)_cos"] = halves(angles.map { $0.map { Float16(cos($0)) } })
            found["\(kind.rawValue)_sin"] = halves(angles.map { $0.map { Float16(sin($0)) } })
            found["\(kind.rawValue)_slots"] = integers(chunk.slots(cache))
            let seen = chunk.seen(cache, columns: try columns(cache, chunk))
            found["\(kind.rawValue)_mask"] = halves(seen.map { $0.map { $0 ? Float16(0) : hidden } })
        }
        return found
    }

    private func columns(_ cache: LayerCache, _ chunk: CoreMLInputs) throws -> Int {
        if cache.kind == .local { return cache.slots + chunk.length }
        guard let shape = states["global_cache"], shape.count > 1, let rows = shape[1] else {
            throw GemmaError.session("the manifest tells no shape of global_cache; export the model again")
        }
        return rows
    }
}

/// This engine runs one package that looks its embeddings up itself.
private func checkLayout(_ graph: Graph, _ manifest: Manifest) throws {
    let isWhole = manifest.graphs["decode-2"] == nil && graph.inputs.contains { $0.name == "tokens" }
    guard isWhole && graph.inputs.contains(where: { $0.name.hasSuffix("_slots") }) else {
        throw GemmaError.session(
            "this app runs packages of --coreml-compute gpu with the embedding inside; export the model again so")
    }
}

/// Far below any score, and within float16: -inf is not for every one of Apple's units.
private let hidden: Float16 = -4e4

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
