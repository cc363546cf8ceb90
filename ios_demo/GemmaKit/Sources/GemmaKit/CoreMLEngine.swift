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
        states = Dictionary(uniqueKeysWithValues: graph.states.map { ($0.name, $0.shape) })
        let package = bundle.directory.appendingPathComponent(graph.file).deletingLastPathComponent()
        do {
            let compiled = try await compiledModel(package, manifest.codesDigest)
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
        let places = (0..<tokens.count).map { chunk.position + $0 }
        var found: [String: Any] = [
            "tokens": integers(padded(tokens, chunk.length)),
            "positions": integers(padded(places, chunk.length)),
            "last": integers([tokens.count - 1]),
        ]
        for kind in [AttentionKind.local, .global] {
            guard let cache = manifest.layers.first(where: { $0.kind == kind }) else { continue }
            found["\(kind.rawValue)_slots"] = integers(chunk.slots(cache))
            found["\(kind.rawValue)_mask"] = mask(chunk.seen(cache, columns: try columns(cache, chunk)))
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

/// Far below any score, and within float16: -inf is not for every one of Apple's units.
private let hidden: Float16 = -4e4

@available(iOS 18, macOS 15, *)
private func loadFunction(_ name: String, _ compiled: URL) throws -> MLModel {
    let configuration = MLModelConfiguration()
    configuration.functionName = name
    return try MLModel(contentsOf: compiled, configuration: configuration)
}

/// The compiled model, kept by the digest of its codes: compiling takes a while.
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

private func mask(_ seen: [[Bool]]) -> MLMultiArray {
    let scalars = seen.flatMap { $0.map { $0 ? Float16(0) : hidden } }
    return MLMultiArray(MLShapedArray<Float16>(scalars: scalars, shape: [seen.count, seen[0].count]))
}
#endif
