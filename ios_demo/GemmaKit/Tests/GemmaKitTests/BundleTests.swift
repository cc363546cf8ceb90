import Foundation
import XCTest

@testable import GemmaKit

final class BundleTests: XCTestCase {
    private var folder = URL(fileURLWithPath: "/")

    override func setUpWithError() throws {
        folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        try FileManager.default.copyItem(at: tiny, to: folder)
    }

    override func tearDownWithError() throws {
        try FileManager.default.removeItem(at: folder)
    }

    func testTheManifestsNumbersAreRead() throws {
        var shares: [Double] = []
        let manifest = try ModelBundle.open(folder) { shares.append($0) }.manifest
        XCTAssertEqual([manifest.vocabSize, manifest.contextLength, manifest.prefillLength], [376, 96, 16])
        XCTAssertEqual(manifest.sampling, try Sampling(temperature: 1, topK: 64, topP: 0.95))
        XCTAssertEqual(manifest.stopTokens, [1, 5])
        XCTAssertEqual(manifest.layers[0], LayerCache(kind: .local, window: 8, slots: 72, kvHeads: 2, headDim: 32))
        XCTAssertEqual(manifest.graphs["decode"]?.map { $0.inputs[0].shape }, [[1, nil]])
        XCTAssertEqual(manifest.cacheBytes, Double(2 * 2 * 32 * 4 * (72 + 96) * 2))
        XCTAssertEqual(shares.last, 1)
    }

    func testALayerThatReadsAnothersCacheStoresNothingAndPartOfARopeMayTurn() throws {
        let path = folder.appendingPathComponent("manifest.json")
        let text = try String(contentsOf: path, encoding: .utf8)
        let whole = try Manifest.parse(Data(text.utf8))
        let fields = try XCTUnwrap(text.range(of: "\"head_dim\": 32\n", options: .backwards))
        let shared = text.replacingCharacters(in: fields, with: "\"head_dim\": 32,\n\"source\": 1\n")
            .replacingOccurrences(of: "\"factor\": 1.0\n    }\n  }", with: "\"factor\": 1.0, \"rotated\": 0.25}}")
        let manifest = try Manifest.parse(Data(shared.utf8))
        XCTAssertEqual(manifest.layers.map(\.source), [nil, nil, nil, 1])
        XCTAssertEqual(whole.cacheBytes - manifest.cacheBytes, Double(2 * 2 * 32 * 96 * 4))
        let wrong = shared.replacingOccurrences(of: "\"rotated\": 0.25", with: "\"rotated\": 1e300")
        assertFails("from 0 to 1") { try Manifest.parse(Data(wrong.utf8)) }
        let ropeless = text.replacingOccurrences(of: "\"ropes\": {\n    \"local\"", with: "\"ropes\": {\n    \"far\"")
        assertFails("no rope for local layers") { try Manifest.parse(Data(ropeless.utf8)) }
    }

    func testFilesThatWereFoundUnalteredAreNotReadAgain() throws {
        let goldens = folder.appendingPathComponent("goldens.json")
        let time = [FileAttributeKey.modificationDate: Date(timeIntervalSince1970: 1e9)]
        try FileManager.default.setAttributes(time, ofItemAtPath: goldens.path)
        let checked = try ModelBundle.open(folder).filesNow()
        var altered = try Data(contentsOf: goldens)
        altered[100] ^= 1
        try altered.write(to: goldens)
        assertFails("goldens.json was altered") { try ModelBundle.open(folder, checked: checked) }
        // With the time of before, the file counts as known: it is not read.
        try FileManager.default.setAttributes(time, ofItemAtPath: goldens.path)
        var shares: [Double] = []
        _ = try ModelBundle.open(folder, checked: checked) { shares.append($0) }
        XCTAssertEqual(shares, [])
        assertFails("goldens.json was altered") { try ModelBundle.open(folder) }
        try altered.dropLast().write(to: goldens)
        try FileManager.default.setAttributes(time, ofItemAtPath: goldens.path)
        assertFails("the manifest says") { try ModelBundle.open(folder, checked: checked) }
    }

    func testARuntimeOlderThanABundleNeedsIsRefused() throws {
        let manifest = try ModelBundle.read(folder).manifest  // needs 1.29.0
        for enough in ["1.29.0", "1.29", "1.30.1", "2"] { try checkRuntime(manifest, "it", enough) }
        for old in ["1.28.9", "1.3", "0.99"] { assertFails("or newer") { try checkRuntime(manifest, "it", old) } }
    }

    func testAnAlteredATruncatedAndAMissingFileAreRefusedByName() throws {
        let goldens = folder.appendingPathComponent("goldens.json")
        let whole = try Data(contentsOf: goldens)
        var altered = whole
        altered[100] ^= 1
        try altered.write(to: goldens)
        try assertRefused("goldens.json was altered")
        try whole.dropLast().write(to: goldens)
        try assertRefused("the manifest says \(whole.count)")
        try FileManager.default.removeItem(at: goldens)
        try assertRefused("goldens.json is missing")
    }

    func testAPathThatLeavesTheBundleIsRefused() throws {
        let manifest = folder.appendingPathComponent("manifest.json")
        let text = try String(contentsOf: manifest, encoding: .utf8)
        for name in ["../goldens.json", "/etc/hostname", "a/../../b", "a\\\\b"] {
            let changed = text.replacingOccurrences(of: "\"goldens.json\": {", with: "\"\(name)\": {")
                .replacingOccurrences(of: "\"goldens\": \"goldens.json\"", with: "\"goldens\": \"\(name)\"")
            try changed.write(to: manifest, atomically: true, encoding: .utf8)
            try assertRefused("outside of the bundle")
        }
        try text.write(to: manifest, atomically: true, encoding: .utf8)
        let goldens = folder.appendingPathComponent("goldens.json")
        try FileManager.default.removeItem(at: goldens)
        try FileManager.default.createSymbolicLink(at: goldens, withDestinationURL: tiny.appendingPathComponent("goldens.json"))
        try assertRefused("a link to a file outside of the bundle")
    }

    func testAnUnknownSchemaVersionAMissingFieldAndAWrongTypeAreRefusedByName() throws {
        let manifest = folder.appendingPathComponent("manifest.json")
        let text = try String(contentsOf: manifest, encoding: .utf8)
        let cases = [
            ("\"schema_version\": 2", "\"schema_version\": 3", "update the app"),
            ("\"schema_version\": 2", "\"schema_version\": 1", "export the model again"),
            ("\"schema_version\": 2", "\"schema_version\": 2, \"kind\": \"encoder\"", "gives vectors of texts"),
            ("\"role\": \"total\"", "\"role\": \"sum\"", "inputs[1].role is \"sum\""),
            ("\"kind\": \"local\"", "\"kind\": \"far\"", "expected local or global"),
            ("\"vocab_size\": 376", "\"vocab_size\": \"376\"", "$.vocab_size is \"376\""),
            ("\"vocab_size\": 376", "\"words\": 376", "no \"vocab_size\""),
            ("\"context_length\": 96", "\"context_length\": -1", "$.context_length"),
            ("\"cache_dtype\": \"float32\"", "\"cache_dtype\": \"int3\"", "float32 or float16 or int8"),
            ("\"goldens\": \"goldens.json\"", "\"goldens\": \"other.json\"", "no digest"),
            ("\"kind\": \"local\",", "\"kind\": \"local\", \"source\": 9,", "not of layer 9"),
            ("\"slots\": 72", "\"slots\": 7", "layer 0 to have slots for its window"),
            ("\"window\": 8", "\"window\": 0", "layer 0 to have slots for its window"),
        ]
        for (old, new, message) in cases {
            XCTAssertTrue(text.contains(old))
            try text.replacingOccurrences(of: old, with: new).write(to: manifest, atomically: true, encoding: .utf8)
            try assertRefused(message)
        }
    }

    func testTensorsAreFoundByRoleAndCachesPairedByLayerWhateverTheirNames() throws {
        let text = try String(contentsOf: folder.appendingPathComponent("manifest.json"), encoding: .utf8)
            .replacingOccurrences(of: "\"past_key_1\"", with: "\"a\"")
            .replacingOccurrences(of: "\"present_key_1\"", with: "\"b\"")
            .replacingOccurrences(of: "\"name\": \"wanted\"", with: "\"name\": \"rows\"")
        let graph = try ModelBundle(directory: folder, manifest: Manifest.parse(Data(text.utf8))).graph("decode")
        XCTAssertEqual(try graph.tensor(.wanted).name, "rows")
        let pairs = try graph.returnedCaches()
        XCTAssertEqual(pairs.count, 8)
        XCTAssertEqual(pairs[1...2].map(\.past.name), ["past_value_0", "a"])
        XCTAssertEqual(pairs[1...2].map(\.present.name), ["present_value_0", "b"])
        assertFails("the role cos") { try graph.tensor(.cos) }
        let withoutOutputs = Graph(file: graph.file, inputs: graph.inputs, outputs: [], states: graph.states)
        assertFails("past_key_0") { try withoutOutputs.returnedCaches() }
    }

    func testAMissingGraphIsRefusedWhereOnePartIsExpected() throws {
        let path = folder.appendingPathComponent("manifest.json")
        let text = try String(contentsOf: path, encoding: .utf8)
        XCTAssertEqual(try ModelBundle.open(folder).graph("exact").file, "exact.onnx")
        let renamed = text.replacingOccurrences(of: "\"exact\": [", with: "\"other\": [")
        let bundle = ModelBundle(directory: folder, manifest: try Manifest.parse(Data(renamed.utf8)))
        assertFails("0 parts of the exact graph") { try bundle.graph("exact") }
    }

    func testABundleTooLargeForTheDeviceGivesAMessageThatSaysWhatToDo() throws {
        let manifest = try ModelBundle.open(folder).manifest
        XCTAssertNil(memoryProblem(manifest, availableBytes: 1e9))
        XCTAssertTrue(try XCTUnwrap(memoryProblem(manifest, availableBytes: 2.5e5)).contains("export a smaller size"))
    }

    func testTheArtifactsDigestDependsOnItsFilesAndOnNothingElse() throws {
        let path = folder.appendingPathComponent("manifest.json")
        let text = try String(contentsOf: path, encoding: .utf8)
        let manifest = try Manifest.parse(Data(text.utf8))
        func altered(_ name: String) throws -> Manifest {
            let digest = try XCTUnwrap(manifest.files[name]?.sha256)
            return try Manifest.parse(Data(text.replacingOccurrences(of: digest, with: String(digest.reversed())).utf8))
        }
        XCTAssertNotEqual(try altered("model.onnx").artifactDigest, manifest.artifactDigest)
        XCTAssertEqual(try altered("goldens.json").artifactDigest, manifest.artifactDigest)
    }

    func testCancellingStopsTheCheckOfABundle() async {
        let folder = folder
        let task = Task { () -> Error? in
            withUnsafeCurrentTask { $0?.cancel() }
            do { _ = try ModelBundle.open(folder) } catch { return error }
            return nil
        }
        let error = await task.value
        XCTAssertTrue(error is CancellationError, "\(String(describing: error))")
    }

    private func assertFails<T>(_ message: String, _ work: () throws -> T) {
        XCTAssertThrowsError(try work()) { error in
            XCTAssertTrue((error as? GemmaError)?.message.contains(message) == true, "\(error)")
        }
    }

    private func assertRefused(_ message: String) throws {
        XCTAssertThrowsError(try ModelBundle.open(folder)) { error in
            XCTAssertTrue((error as? GemmaError)?.message.contains(message) == true, "\(error)")
        }
    }
}
