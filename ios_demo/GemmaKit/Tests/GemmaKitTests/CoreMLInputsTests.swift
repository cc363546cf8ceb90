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

    func testComputeUnitsAreAsChosenOrSuitTheLayout() throws {
        let graph = try ModelBundle.open(tiny).graph("decode")
        let write = TensorSpec(name: "w", dtype: "float16", shape: [72, 1], role: .write, kind: .local, layer: nil)
        let dense = Graph(file: graph.file, inputs: graph.inputs + [write], outputs: [], states: [])
        XCTAssertEqual(ComputeUnits.automatic.used(for: graph), .cpuAndGPU)
        XCTAssertEqual(ComputeUnits.automatic.used(for: dense), .cpuAndNeuralEngine)
        for units in ComputeUnits.allCases.dropFirst() { XCTAssertEqual(units.used(for: dense), units) }
        XCTAssertEqual(Set(ComputeUnits.allCases.map(\.title)).count, 5)
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
        XCTAssertThrowsError(try value(.embeddings, nil, [4, 64]), "there is no table")
    }

    func testInputsForTheGPUAndTheNeuralEngineEqualPythons() throws {
        let whole = try ModelBundle.open(tiny).manifest
        let text = try String(contentsOf: tiny.appendingPathComponent("manifest.json"), encoding: .utf8)
        XCTAssertEqual(whole.ropes.count, 2)
        let manifest = try Manifest.parse(Data(withRopes(text).utf8))
        let checked = try json(pythonsVectors().appendingPathComponent("inputs.json")).list { vector -> String in
            let tokens = try vector.of("tokens").ints()
            let inputs = CoreMLInputs(position: try vector.of("position").count(), count: tokens.count, length: 4)
            let role = try XCTUnwrap(TensorRole(rawValue: vector.of("role").string()))
            let kind = try vector.orNil("kind").flatMap { AttentionKind(rawValue: try $0.string()) }
            let shape: [Int?] = try vector.of("shape").ints()
            let spec = TensorSpec(name: "any", dtype: "", shape: shape, role: role, kind: kind, layer: nil)
            let expected = try vector.of("values").list { try $0.double() }
            switch try inputs.value(of: spec, tokens: tokens, manifest: manifest) {
            case .integers(let values): XCTAssertEqual(values.map(Double.init), expected, "\(role)")
            case .halves(let rows):
                XCTAssertEqual(rows.count, shape[0])
                XCTAssertEqual(rows.joined().map { Double(Float16($0)) }, expected, "\(role)")
            }
            return role.rawValue
        }
        XCTAssertEqual(Set(checked), ["tokens", "last", "cos", "sin", "mask", "slots", "write"])
    }

    func testRowsOfAnEmbeddingTableEqualPythons() throws {
        let folder = try pythonsVectors()
        let files = try json(folder.appendingPathComponent("tables.json")).list { vector -> String in
            let name = try vector.of("file").string()
            let path = folder.appendingPathComponent(name)
            let width = try vector.of("width").count()
            let table = try EmbeddingTable(path, width: width)
            let expected = try vector.of("rows").list { try $0.list { try $0.double() } }
            let rows = try vector.of("tokens").ints().map { try table.row($0).map { Double(Float16($0)) } }
            XCTAssertEqual(rows, expected, name)
            XCTAssertThrowsError(try table.row(24))
            XCTAssertThrowsError(try EmbeddingTable(path, width: width + 1), name)
            try checkPadding(table, width: width)
            return name
        }
        XCTAssertEqual(files.count, 4)
    }

    /// A row of each table for each token, and of token 0 for padding.
    private func checkPadding(_ table: EmbeddingTable, width: Int) throws {
        let manifest = try ModelBundle.read(tiny).manifest
        for role in [TensorRole.embeddings, .perLayer] {
            let spec = TensorSpec(name: "", dtype: "", shape: [3, width], role: role, kind: nil, layer: nil)
            let inputs = CoreMLInputs(position: 5, count: 2, length: 3)
            let value = try inputs.value(of: spec, tokens: [7, 9], manifest: manifest, tables: [role: table])
            XCTAssertEqual(value, .halves(try [7, 9, 0].map { try table.row($0).map(Double.init) }))
            XCTAssertThrowsError(try inputs.value(of: spec, tokens: [7, 9], manifest: manifest))
        }
    }

    func testPartsOfAModelMustFollowEachOther() throws {
        let manifest = try ModelBundle.open(tiny).manifest
        XCTAssertEqual(try coreMLParts(manifest).count, 1)
        let text = try String(contentsOf: tiny.appendingPathComponent("manifest.json"), encoding: .utf8)
        let hidden = text.replacingOccurrences(of: "\"role\": \"tokens\"", with: "\"role\": \"hidden\"")
        XCTAssertThrowsError(try coreMLParts(Manifest.parse(Data(hidden.utf8))))
        let missing = text.replacingOccurrences(of: "\"prefill\": [", with: "\"other\": [")
        XCTAssertThrowsError(try coreMLParts(Manifest.parse(Data(missing.utf8))))
    }

    /// The manifest with the ropes of `tests/data/ios_vectors.py`.
    private func withRopes(_ text: String) throws -> String {
        guard case .object(let object) = try parseJSON(text) else { throw GemmaError.json("no object") }
        let ropes = try parseJSON(
            #"{"local": {"base": 1e4, "factor": 1}, "global": {"base": 1e6, "factor": 8, "rotated": 0.25}}"#)
        return JSON.object(JSONObject(object.fields.map { ($0.name, $0.name == "ropes" ? ropes : $0.value) })).write()
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
