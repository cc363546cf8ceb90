import Foundation

/// The inputs of a Core ML program beside its tokens: the cache slots they are written to, the attention
/// masks, and the rotary angles.
///
/// The host computes them, so the program computes no index itself. T tokens of a chunk, padded to a fixed
/// length; S slots, D head size. As in `gemma_runtime/backends/chunk_inputs.py`.
public struct CoreMLInputs {
    public let position: Int
    public let count: Int  // tokens of the chunk that are not padding
    public let length: Int  // T

    /// The slot each token is written to, (T); padding goes to the row after the slots, which is always masked.
    public func slots(_ cache: LayerCache) -> [Int] {
        (0..<length).map { $0 < count ? (position + $0) % cache.slots : cache.slots }
    }

    /// Rotary angles of each token, (T, D / 2).
    public func angles(_ rope: Rope, _ cache: LayerCache) -> [[Double]] {
        (0..<length).map { index in
            (0..<cache.headDim / 2).map { i in
                Double(position + index) / rope.factor * pow(rope.base, -2 * Double(i) / Double(cache.headDim))
            }
        }
    }

    /// Which columns each token attends to, (T, columns).
    ///
    /// On local layers the columns are the ring's slots before this chunk, then the chunk's tokens; on global
    /// layers every row of the state, including the padding row after the slots.
    public func seen(_ cache: LayerCache, columns: Int) -> [[Bool]] {
        let held = cache.kind == .local ? heldByRing(cache) : heldByContext(columns)
        return (0..<length).map { index in
            let query = position + index
            let oldest = cache.window.map { query - $0 + 1 } ?? 0
            return held.map { $0 >= max(0, oldest) && $0 <= query }
        }
    }

    /// The position that each slot of the ring holds (negative if empty), then the positions of the chunk.
    private func heldByRing(_ cache: LayerCache) -> [Int] {
        let ring = (0..<cache.slots).map { slot in
            position - 1 - ((position - 1 - slot) % cache.slots + cache.slots) % cache.slots
        }
        return ring + (0..<length).map { $0 < count ? position + $0 : -1 }
    }

    private func heldByContext(_ columns: Int) -> [Int] {
        (0..<columns).map { $0 < position + count ? $0 : -1 }
    }
}
