import Foundation

/// The values of an input, before they are rounded to the program's type.
public enum CoreMLValue: Equatable {
    case integers([Int])
    case halves([[Double]])
}

/// The graphs of one package: consecutive layers of the model.
public struct CoreMLPart: Equatable {
    public let prefill: Graph
    public let decode: Graph
}

/// The packages of a model, in the order in which they run; throws a bundle error if they don't fit together.
public func coreMLParts(_ manifest: Manifest) throws -> [CoreMLPart] {
    let (prefill, decode) = (manifest.graphs["prefill"] ?? [], manifest.graphs["decode"] ?? [])
    guard prefill.count == decode.count, let first = decode.first else {
        throw GemmaError.bundle(
            "manifest.json has \(prefill.count) parts of prefill and \(decode.count) of decode; export the model again")
    }
    let parts = zip(prefill, decode).map { CoreMLPart(prefill: $0, decode: $1) }
    let takesHidden = parts.map { $0.decode.inputs.contains { $0.role == .hidden } }
    guard !first.inputs.contains(where: { $0.role == .hidden }), takesHidden.dropFirst().allSatisfy({ $0 }) else {
        throw GemmaError.bundle("manifest.json has parts that don't follow each other; export the model again")
    }
    return parts
}

/// Far below any attention score and within float16; not every Apple compute unit handles -inf.
private let hidden = -4e4

/// The inputs of a program for Core ML or Core AI beside its tokens: the cache slots they are written to, the attention
/// masks, and the rotary angles.
///
/// The host computes them, so the program computes no index itself. T tokens of a chunk, padded to a fixed
/// length; S slots, D head size. As in `gemma_runtime/backends/chunk_inputs.py`.
public struct CoreMLInputs {
    public let position: Int
    public let count: Int  // tokens of the chunk that are not padding
    public let length: Int  // T

    /// The value of one input, by its role and its kind of layers; `tables` are those outside of the program, by the role
    /// of the input that takes their rows.
    public func value(
        of spec: TensorSpec, tokens: [Int], manifest: Manifest, tables: [TensorRole: EmbeddingTable] = [:]
    ) throws -> CoreMLValue {
        switch spec.role {
        case .tokens: return .integers(tokens + [Int](repeating: 0, count: length - count))
        case .embeddings, .perLayer:
            guard let table = tables[spec.role] else { throw unsupported(spec) }
            return .halves(try (tokens + [Int](repeating: 0, count: length - count)).map { try table.row($0).map(Double.init) })
        case .last: return .integers([count - 1])
        case .slots: return .integers(slots(try cache(of: spec, manifest)))
        case .write: return .halves(onehot(try cache(of: spec, manifest)))
        case .cos: return .halves(try angles(of: spec, manifest).map { $0.map { cos($0) } })
        case .sin: return .halves(try angles(of: spec, manifest).map { $0.map { sin($0) } })
        case .mask:
            guard spec.shape.count == 2, let columns = spec.shape[1] else { throw unsupported(spec) }
            let visible = seen(try cache(of: spec, manifest), columns: columns)
            return .halves(visible.map { $0.map { $0 ? 0 : hidden } })
        default: throw unsupported(spec)
        }
    }

    private func angles(of spec: TensorSpec, _ manifest: Manifest) throws -> [[Double]] {
        let layout = try cache(of: spec, manifest)
        guard let rope = manifest.ropes[layout.kind.rawValue] else { throw unsupported(spec) }
        return angles(rope, layout)
    }

    private func cache(of spec: TensorSpec, _ manifest: Manifest) throws -> LayerCache {
        guard let cache = manifest.layers.first(where: { $0.kind == spec.kind }) else { throw unsupported(spec) }
        return cache
    }

    private func unsupported(_ spec: TensorSpec) -> GemmaError {
        .session("this app has no value for the input \(spec.name) with the role \(spec.role.rawValue); export the model again")
    }

    /// The slot each token is written to, (T); padding goes to the row after the slots, which is always masked.
    public func slots(_ cache: LayerCache) -> [Int] {
        (0..<length).map { $0 < count ? (position + $0) % cache.slots : cache.slots }
    }

    /// (S, T): 1 where a token is written; the column of padding is 0.
    private func onehot(_ cache: LayerCache) -> [[Double]] {
        let places = slots(cache)
        return (0..<cache.slots).map { slot in places.map { $0 == slot ? 1 : 0 } }
    }

    /// Rotary angles of each token, (T, D / 2).
    public func angles(_ rope: Rope, _ cache: LayerCache) -> [[Double]] {
        (0..<length).map { rope.angles(at: position + $0, headDim: cache.headDim) }
    }

    /// Which columns each token attends to, (T, columns).
    ///
    /// On local layers the columns are the ring's slots before this chunk, then the chunk's tokens; on global
    /// layers every row of the state, including the padding row after the slots.
    public func seen(_ cache: LayerCache, columns: Int) -> [[Bool]] {
        let positions = cache.kind == .local ? ringPositions(cache) : contextPositions(columns)
        return (0..<length).map { index in
            let query = position + index
            let oldest = cache.window.map { query - $0 + 1 } ?? 0
            return positions.map { $0 >= max(0, oldest) && $0 <= query }
        }
    }

    /// The position that each slot of the ring holds (negative if empty), then the positions of the chunk.
    private func ringPositions(_ cache: LayerCache) -> [Int] {
        let ring = (0..<cache.slots).map { slot in
            position - 1 - ((position - 1 - slot) % cache.slots + cache.slots) % cache.slots
        }
        return ring + (0..<length).map { $0 < count ? position + $0 : -1 }
    }

    private func contextPositions(_ columns: Int) -> [Int] {
        (0..<columns).map { $0 < position + count ? $0 : -1 }
    }
}
