import Foundation
import XCTest

@testable import GemmaKit

final class LibraryTests: XCTestCase {
    private var root = URL(fileURLWithPath: "/")
    private var library = BundleLibrary(folder: URL(fileURLWithPath: "/"), support: URL(fileURLWithPath: "/"))
    private var compiled: URL { root.appendingPathComponent("compiled") }

    override func setUpWithError() throws {
        root = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        library = BundleLibrary(
            folder: root.appendingPathComponent("Documents"), support: root.appendingPathComponent("Support"),
            compiled: compiled)
        try library.prepare()
    }

    override func tearDownWithError() throws {
        try FileManager.default.removeItem(at: root)
    }

    func testAnEmptyLibrarySaysWhatGoesIntoIt() throws {
        XCTAssertEqual(library.bundles(), [])
        XCTAssertEqual(try FileManager.default.contentsOfDirectory(atPath: library.folder.path), ["Copy bundles here.txt"])
    }

    func testAFolderIsCopiedWithTheFilesThatItsManifestListsAndNotReadAgain() throws {
        let source = root.appendingPathComponent("tiny")
        try FileManager.default.copyItem(at: tiny, to: source)
        try Data("x".utf8).write(to: source.appendingPathComponent("unlisted.txt"))
        var shares: [Double] = []
        let first = try library.add(from: source) { shares.append($0) }
        let second = try library.add(from: source)
        XCTAssertEqual([first, second].map(\.lastPathComponent), ["tiny", "tiny 2"])
        XCTAssertEqual(library.bundles(), [first, second])
        XCTAssertEqual(shares, shares.sorted())
        XCTAssertEqual(shares.last, 1)
        XCTAssertFalse(FileManager.default.fileExists(atPath: first.appendingPathComponent("unlisted.txt").path))
        var read: [Double] = []
        let bundle = try library.open(first) { read.append($0) }
        XCTAssertEqual(read, [], "it was checked when it was copied")
        XCTAssertEqual(bundle.manifest, try ModelBundle.open(tiny).manifest)
    }

    func testABundleThatWasCopiedByHandIsReadOnce() throws {
        let place = library.folder.appendingPathComponent("mine")
        try FileManager.default.copyItem(at: tiny, to: place)
        var counts: [Int] = []
        for _ in 0..<2 {
            var shares: [Double] = []
            _ = try library.open(place) { shares.append($0) }
            counts.append(shares.count)
        }
        XCTAssertGreaterThan(counts[0], 0)
        XCTAssertEqual(counts[1], 0)
        XCTAssertEqual(library.bundle(named: "mine"), library.bundles()[0])
        XCTAssertNil(library.bundle(named: "yours"))
    }

    func testAnAlteredOrIncompleteFolderIsRefusedAndLeavesNothing() throws {
        let source = root.appendingPathComponent("source")
        try FileManager.default.copyItem(at: tiny, to: source)
        let goldens = source.appendingPathComponent("goldens.json")
        var altered = try Data(contentsOf: goldens)
        altered[100] ^= 1
        try altered.write(to: goldens)
        try assertRefused(source, "goldens.json was altered")
        try Data(count: altered.count + 1).write(to: goldens)
        try assertRefused(source, "larger than the manifest says")
        try FileManager.default.removeItem(at: goldens)
        try assertRefused(source, "goldens.json can't be read")
        try assertRefused(root.appendingPathComponent("nowhere"), "is missing")
    }

    func testZipFilesStoredDeflatedAndLargeAreUnpacked() throws {
        let folder = try pythonsVectors()
        for name in ["stored", "deflated", "large"] {
            let place = try library.add(from: folder.appendingPathComponent("\(name).zip"))
            XCTAssertEqual(place.lastPathComponent, name)
            XCTAssertEqual(try library.open(place).manifest, try ModelBundle.open(tiny).manifest)
        }
        XCTAssertEqual(library.bundles().count, 3)
    }

    func testDamagedZipFilesAreRefusedAndLeaveNothing() throws {
        let folder = try pythonsVectors()
        var random = SeededRandom(state: 5)
        let copy = root.appendingPathComponent("copy.zip")
        var refused = 0
        for name in ["stored", "deflated", "large"] {
            let whole = Array(try Data(contentsOf: folder.appendingPathComponent("\(name).zip")))
            for round in 0..<12 {
                // The directory is at the end; damage to the beginning changes headers and data.
                let bytes = round % 2 == 0 ? damaged(whole, &random) : damaged(whole.reversed(), &random).reversed()
                try Data(bytes).write(to: copy)
                do {
                    try FileManager.default.removeItem(at: library.add(from: copy))
                } catch is GemmaError {
                    refused += 1
                }
            }
        }
        XCTAssertGreaterThan(refused, 18)
        XCTAssertEqual(library.bundles(), [])
        XCTAssertEqual(incoming, [])
        try Data("no zip".utf8).write(to: copy)
        try assertRefused(copy, "is not a zip file")
    }

    func testInflateGivesBackWhatZlibPacked() throws {
        let checked = try json(pythonsVectors().appendingPathComponent("packed.json")).list { vector -> Bool in
            let expected = try XCTUnwrap(Data(base64Encoded: vector.of("data").string()))
            let packed = Array(try XCTUnwrap(Data(base64Encoded: vector.of("packed").string())))
            XCTAssertEqual(try unpack(packed, blockSize: 1000), expected)
            XCTAssertThrowsError(try unpack(packed.dropLast(), blockSize: 7))
            return true
        }
        XCTAssertEqual(checked.count, 35)
    }

    func testDeletingABundleDeletesWhatWasCompiledForItAndForNoOther() throws {
        let bundle = try library.add(from: tiny)
        let digest = try library.open(bundle).manifest.artifactDigest
        for name in [digest, "of-no-bundle"] {
            let model = compiled.appendingPathComponent(name)
            try FileManager.default.createDirectory(at: model, withIntermediateDirectories: true)
        }
        library.clean()
        XCTAssertEqual(try FileManager.default.contentsOfDirectory(atPath: compiled.path), [digest])
        try library.delete(bundle)
        XCTAssertEqual(library.bundles(), [])
        XCTAssertEqual(try FileManager.default.contentsOfDirectory(atPath: compiled.path), [])
    }

    func testStoppingACopyLeavesNothing() async throws {
        let library = library
        let task = Task { () -> Error? in
            do {
                _ = try library.add(from: tiny) { _ in withUnsafeCurrentTask { $0?.cancel() } }
            } catch { return error }
            return nil
        }
        let error = await task.value
        XCTAssertTrue(error is CancellationError, "\(String(describing: error))")
        XCTAssertEqual(library.bundles(), [])
        XCTAssertEqual(incoming, [])
    }

    private var incoming: [String] {
        let folder = root.appendingPathComponent("Support/incoming").path
        return (try? FileManager.default.contentsOfDirectory(atPath: folder)) ?? []
    }

    private func unpack(_ packed: [UInt8], blockSize: Int) throws -> Data {
        var at = 0
        var out = Data()
        var inflate = Inflate(
            read: {
                defer { at = min(at + blockSize, packed.count) }
                return Array(packed[at..<min(at + blockSize, packed.count)])
            }, write: { out += $0 })
        try inflate.run()
        return out
    }

    private func assertRefused(_ source: URL, _ message: String) throws {
        XCTAssertThrowsError(try library.add(from: source)) { error in
            XCTAssertTrue((error as? GemmaError)?.message.contains(message) == true, "\(error)")
        }
        XCTAssertEqual(library.bundles(), [])
        XCTAssertEqual(incoming, [])
    }
}

final class SavedChatsTests: XCTestCase {
    private let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)

    override func tearDownWithError() throws {
        try FileManager.default.removeItem(at: folder)
    }

    func testChatsAndStateAreReadBackAndADamagedFileIsLeftOut() throws {
        let store = ChatStore(folder)
        let old = SavedChat(
            turns: [Message(.user, "é\u{0301}😀"), Message(.assistant, "in")], changed: Date(timeIntervalSince1970: 1))
        let new = SavedChat(turns: [Message(.user, "two")], changed: Date(timeIntervalSince1970: 2))
        try store.save(old)
        try store.save(new)
        XCTAssertEqual(store.load(), [new, old])
        XCTAssertEqual(old.title.unicodeScalars.count, 3)
        try checkForgotten(store, in: old)
        var state = AppState()
        state.bundle = "tiny"
        state.settings.system = "be brief"
        state.settings.sampling = try Sampling(temperature: 0.5, topK: 3, topP: 0.25, minP: 0.125, repetitionPenalty: 1.5)
        state.settings.seed = 7
        let grammar = try GrammarFile(name: "é", text: #"{"nodes": [["text", "in"]], "start": 0}"#)
        state.settings.format = try AnswerFormat(schema: #"{"type": "string"}"#, grammar: grammar)
        try store.save(state)
        XCTAssertEqual(store.loadState(), state)
        try Data("{".utf8).write(to: folder.appendingPathComponent("chats/\(new.id.uuidString).json"))
        try Data("{".utf8).write(to: folder.appendingPathComponent("state.json"))
        XCTAssertEqual(store.load(), [old])
        XCTAssertEqual(store.loadState(), AppState())
        try store.delete(old.id)
        XCTAssertEqual(store.load(), [])
        let kept = SavedChat(settings: state.settings, turns: [Message(.user, "one")], changed: Date(timeIntervalSince1970: 3))
        try store.save(kept)
        XCTAssertEqual(store.load(), [kept])
        let file = folder.appendingPathComponent("chats/\(kept.id.uuidString).json")
        let damaged = try String(contentsOf: file, encoding: .utf8).replacingOccurrences(of: "nodes", with: "node")
        try damaged.write(to: file, atomically: true, encoding: .utf8)
        XCTAssertEqual(store.load(), [])
    }

    /// How many turns are forgotten is missing in older files, and at most all.
    private func checkForgotten(_ store: ChatStore, in chat: SavedChat) throws {
        let file = folder.appendingPathComponent("chats/\(chat.id.uuidString).json")
        let text = try String(contentsOf: file, encoding: .utf8)
        XCTAssertTrue(text.contains(#""forgotten":0"#), text)
        for (written, read) in [("\"forgotten\":2", 2), ("\"other\":2", 0), ("\"forgotten\":3", nil), ("\"forgotten\":-1", nil)] {
            try text.replacingOccurrences(of: "\"forgotten\":0", with: written).write(to: file, atomically: true, encoding: .utf8)
            XCTAssertEqual(store.load().first { $0.id == chat.id }?.forgotten, read, written)
        }
        try store.save(chat)
    }

    func testSettingsOfOtherVersionsKeepWhatIsKnownOfThem() throws {
        let store = ChatStore(folder)
        var state = AppState()
        state.settings.system = "be brief"
        state.computeUnits = .cpuAndNeuralEngine
        try store.save(state)
        XCTAssertEqual(store.loadState(), state)
        let file = folder.appendingPathComponent("state.json")
        let text = try String(contentsOf: file, encoding: .utf8)
        let old = text.replacingOccurrences(of: #""computeUnits":"cpu_and_neural_engine""#, with: #""units":1"#)
            .replacingOccurrences(of: #""system""#, with: #""computeUnits":"cpu_and_neural_engine","system""#)
        try old.write(to: file, atomically: true, encoding: .utf8)
        XCTAssertEqual(store.loadState(), state, "they were part of the settings")
        state.computeUnits = .automatic
        let units = #""computeUnits":"cpu_and_neural_engine""#
        XCTAssertTrue(text.contains(units), text)
        for other in [#""computeUnits":"quantum""#, #""computeUnits":7"#, #""computeUnits":null"#, #""units":"all""#] {
            try text.replacingOccurrences(of: units, with: other).write(to: file, atomically: true, encoding: .utf8)
            XCTAssertEqual(store.loadState(), state, other)
        }
    }

    /// The bundle, the chat and the compute units were lost with them.
    func testSettingsThatCannotBeReadAreReplacedAlone() throws {
        let store = ChatStore(folder)
        var state = AppState()
        (state.bundle, state.chat, state.computeUnits) = ("tiny", UUID(), .cpuOnly)
        state.settings.system = "be brief"
        try store.save(state)
        let file = folder.appendingPathComponent("state.json")
        let text = try String(contentsOf: file, encoding: .utf8)
        state.settings = ChatSettings()
        for (whole, damaged) in [(#""be brief""#, "7"), (#""thinking":false"#, #""other":1"#), (#""settings":"#, #""other":"#)] {
            XCTAssertTrue(text.contains(whole), text)
            try text.replacingOccurrences(of: whole, with: damaged).write(to: file, atomically: true, encoding: .utf8)
            XCTAssertEqual(store.loadState(), state, damaged)
        }
    }

    func testSamplingOutOfRangeIsRefusedWhereItIsReadAndWhereItIsEdited() throws {
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        let sampling = #"{"temperature": -1, "top_k": 1, "top_p": 1, "min_p": 0, "repetition_penalty": 1}"#
        XCTAssertThrowsError(try JSONDecoder().decode(Sampling.self, from: Data(sampling.utf8)))
        var draft = SamplingDraft(nil)
        XCTAssertEqual(try draft.sampling(), try Sampling(temperature: 1, topK: 64, topP: 0.95))
        draft.topP = 0
        XCTAssertThrowsError(try draft.sampling())
    }
}
