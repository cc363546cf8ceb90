import XCTest

@testable import GemmaKit

final class CoreMLInputsTests: XCTestCase {
    /// Writes chunks of many lengths into a simulated cache: each token attends to its window and to nothing else.
    func testEachTokenAttendsToItsWindowInEveryChunking() {
        let local = LayerCache(kind: .local, window: 5, slots: 5, kvHeads: 1, headDim: 1)
        let global = LayerCache(kind: .global, window: nil, slots: 40, kvHeads: 1, headDim: 1)
        for cache in [local, global] {
            for counts in [[1, 1, 1, 1, 1, 1, 1, 1], [4, 4, 4, 4, 4], [3, 4, 1, 2, 4, 4, 1, 1, 4], [4, 1, 4, 1, 4]] {
                check(cache, counts, length: 4)
            }
        }
    }

    func testAnglesGrowWithThePositionAndFallWithTheDimension() {
        let cache = LayerCache(kind: .global, window: nil, slots: 8, kvHeads: 1, headDim: 4)
        let inputs = CoreMLInputs(position: 6, count: 2, length: 2)
        let angles = inputs.angles(Rope(base: 100, factor: 2), cache)
        XCTAssertEqual(angles.map { $0.map { ($0 * 1e9).rounded() / 1e9 } }, [[3, 0.3], [3.5, 0.35]])
    }

    func testInputsAreFilledByRoleAndKindWhateverTheirNames() throws {
        let manifest = try ModelBundle.open(tiny).manifest  // local layers of 72 slots, global ones of 96
        let inputs = CoreMLInputs(position: 71, count: 3, length: 4)
        func value(_ role: TensorRole, _ kind: AttentionKind?, _ shape: [Int?]) throws -> CoreMLValue {
            let spec = TensorSpec(name: "any", dtype: "float16", shape: shape, role: role, kind: kind, layer: nil)
            return try inputs.value(of: spec, tokens: [7, 8, 9], manifest: manifest)
        }
        XCTAssertEqual(try value(.tokens, nil, [4]), .integers([7, 8, 9, 0]))
        XCTAssertEqual(try value(.last, nil, [1]), .integers([2]))
        XCTAssertEqual(try value(.slots, .local, [4]), .integers([71, 0, 1, 72]))
        XCTAssertEqual(try value(.slots, .global, [4]), .integers([71, 72, 73, 96]))
        guard case .halves(let mask) = try value(.mask, .global, [4, 128]) else { return XCTFail("no mask") }
        XCTAssertEqual(mask.map { $0.filter { $0 == 0 }.count }, [72, 73, 74, 74])
        XCTAssertEqual(mask.map(\.count), [128, 128, 128, 128])
        XCTAssertThrowsError(try value(.mask, nil, [4, 128]))
        XCTAssertThrowsError(try value(.write, .local, [72, 4]))
    }

    private func check(_ cache: LayerCache, _ counts: [Int], length: Int) {
        var rows = [Int](repeating: -1, count: cache.slots + 1)  // the position each row holds; the last row takes the padding
        var position = 0
        for count in counts {
            let length = count == 1 ? 1 : length
            let inputs = CoreMLInputs(position: position, count: count, length: length)
            let chunk = (0..<length).map { $0 < count ? position + $0 : -1 }
            let before = Array(rows.dropLast())
            for (index, slot) in inputs.slots(cache).enumerated() { rows[slot] = chunk[index] }
            let columns = cache.kind == .local ? before + chunk : rows
            let seen = inputs.seen(cache, columns: columns.count)
            for index in 0..<count {
                let query = position + index
                let visible = zip(columns, seen[index]).filter(\.1).map(\.0).sorted()
                let oldest = max(0, query - (cache.window ?? query + 1) + 1)
                XCTAssertEqual(visible, Array(oldest...query), "\(cache.kind) at \(query) of \(counts)")
            }
            position += count
        }
    }
}
