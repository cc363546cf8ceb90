import Foundation
import XCTest

@testable import GemmaKit

/// Mutated bundles by the thousand. Each file is read or refused in one line, with bounded processor time and memory.
/// The seed is fixed, so a failure comes again. A reader that traps ends all tests; the name of this one is then the last.
final class MutationTests: XCTestCase {
    private let root = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
    private var random = SeededRandom(state: 7)

    override func setUpWithError() throws {
        try FileManager.default.createDirectory(at: root, withIntermediateDirectories: true)
    }

    override func tearDownWithError() throws {
        try FileManager.default.removeItem(at: root)
    }

    private enum Kind { case bytes, numbers, values }

    /// Gives mutations of a file to its reader; both outcomes must come, or the mutations are too weak or too strong.
    private func attack(_ whole: Data, _ kind: Kind, _ count: Int, _ reader: (Data) throws -> Void) throws {
        try reader(whole)
        let value = kind == .values ? try parseJSON(String(decoding: whole, as: UTF8.self)) : .null
        var (read, refused) = (0, 0)
        forgetPeak()
        let before = peakBytes()
        for round in 0..<count {
            let file = mutated(Array(whole), kind, value)
            let started = clock()
            do {
                try reader(file)
                read += 1
            } catch let error as GemmaError {
                refused += 1
                XCTAssertEqual(oneLine(error.message), error.message)
            } catch {
                XCTFail("mutation \(round): \(error)")
            }
            let seconds = Double(clock() - started) / Double(CLOCKS_PER_SEC)
            XCTAssertLessThan(seconds, mostSeconds, "mutation \(round) of the kind \(kind)")
        }
        XCTAssertLessThan(peakBytes() - before, mostBytes)
        XCTAssertGreaterThan(refused, 0)
        if count >= 100 { XCTAssertGreaterThan(read, 0) }  // of fewer, all may be refused
    }

    private func mutated(_ whole: [UInt8], _ kind: Kind, _ value: JSON) -> Data {
        switch kind {
        case .bytes: return Data(damaged(whole, &random))
        case .numbers: return Data(withNumber(whole, &random))
        case .values:
            var value = value
            for _ in 0...Int.random(in: 0..<3, using: &random) { value = altered(value, &random) }
            return Data(value.write().utf8)
        }
    }

    private func file(_ name: String, in folder: URL = tiny) throws -> Data {
        try Data(contentsOf: folder.appendingPathComponent(name))
    }

    func testManifests() throws {
        let folder = root.appendingPathComponent("bundle")
        try FileManager.default.copyItem(at: tiny, to: folder)
        let use = { (file: Data) throws in try self.use(ModelBundle(directory: folder, manifest: Manifest.parse(file))) }
        try attack(file("manifest.json"), .bytes, 200, use)
        try attack(file("manifest.json"), .values, 400, use)
        try attack(file("manifest.json"), .values, 40) { file in  // which hashes the files of those that can be read
            try file.write(to: folder.appendingPathComponent("manifest.json"))
            _ = try ModelBundle.open(folder)
        }
    }

    /// What the app does with a manifest, but for the model.
    private func use(_ bundle: ModelBundle) throws {
        let manifest = bundle.manifest
        _ = memoryProblem(manifest, availableBytes: 8e9)
        _ = Workload(contextLength: manifest.contextLength)
        _ = (manifest.artifactDigest, try ChatSettings().sampling(manifest))
        try checkRuntime(manifest, "it", "1.29.0")
        let graph = try bundle.graph("decode")
        _ = (try graph.returnedCaches(), try graph.tensor(.logits), ComputeUnits.automatic.used(for: graph))
        let session = EngineSession(Zeros(vocabSize: min(manifest.vocabSize, 1000)), manifest)
        _ = try session.prefill([Int](repeating: 0, count: 30))
        _ = try session.score([Int](repeating: 0, count: 40))
        _ = try session.rewind(to: 20)
        let chunk = CoreMLInputs(position: 0, count: 1, length: 1)
        for spec in graph.inputs where spec.role != .mask { _ = try? chunk.value(of: spec, tokens: [0], manifest: manifest) }
    }

    func testTokenizers() throws {
        for folder in [tiny, data.appendingPathComponent("gemma4")] {
            let use = { (file: Data) throws in
                let tokenizer = try Tokenizer(file)
                let text = "<bos><start_of_turn>user\n\n<mask> é😀 <|channel>the user"
                _ = try tokenizer.decode(tokenizer.encodeTemplate(text))
                _ = tokenizer.decode(Array(-2..<398))
            }
            try attack(file("tokenizer.gtok", in: folder), .bytes, 300, use)
            try attack(file("tokenizer.gtok", in: folder), .numbers, 300, use)
        }
    }

    func testChatFormats() throws {
        let turns = [
            Message(.system, "be brief"), Message(.user, "the"), Message(.assistant, "a</think>b"), Message(.user, "us"),
        ]
        for folder in [tiny, data.appendingPathComponent("gemma4")] {
            let tokenizer = try Tokenizer(file("tokenizer.gtok", in: folder))
            let use = { (file: Data) throws in
                let format = try ChatFormat(file)
                for one in [format, format.thinking].compactMap({ $0 }) {
                    _ = try encodeChat(tokenizer, one, turns)
                    _ = try encodeChat(tokenizer, one, turns, tools: try Tools(exampleTools))
                }
            }
            try attack(file("chat.json", in: folder), .bytes, 400, use)
            try attack(file("chat.json", in: folder), .values, 400, use)
        }
    }

    func testTools() throws {
        let marked = try gemma4Codec()
        for format in [marked.format, marked.format.with(tools: .prompt("tools:"))] {
            let use = { (file: Data) throws in
                let tools = try Tools(String(decoding: file, as: UTF8.self))
                try checkTools(marked.tokenizer, format, tools)
                _ = try encodeChat(marked.tokenizer, format, [Message(.user, "the")], tools: tools)
            }
            try attack(Data(exampleTools.utf8), .bytes, 300, use)
            try attack(Data(exampleTools.utf8), .values, 300, use)
        }
    }

    /// Of replies nothing is refused: what is no call is text.
    func testCallsInReplies() throws {
        let marks = try gemma4Codec().format.tools?.marks
        let json = "in ```json\n[{\"name\": \"f\", \"parameters\": {\"a\": [1, {\"b\": 2.5}]}}, {\"name\": \"f\"}]\n``` the"
        let marked = "<|tool_call>call:f{a:<|\"|>the<|\"|>,b:[1,{c:null}]}<tool_call|> in <|tool_call>call:f{}<tool_call|>"
        func many(_ text: String, _ count: Int) -> String { String(repeating: text, count: count) }
        let open = many("[", 2000)
        for whole in [json, marked, open, "<|tool_call>call:f{a:\(open)", many("```\n", 500), many(marked, 50)] {
            for _ in 0..<60 {
                let text = String(decoding: damaged(Array(whole.utf8), &random), as: UTF8.self)
                let found = findCalls(text, ["f"], marks)
                if found.calls.isEmpty { XCTAssertEqual(Array(found.text.utf8), Array(text.utf8)) }
                for call in found.calls { _ = try parseJSON(JSON.object(call.arguments).pythonJSON()) }
            }
        }
    }

    func testSavedChats() throws {
        let call = Message(
            .assistant, "", toolCalls: [ToolCall(name: "f", arguments: JSONObject([("a", .array([.number(1)]))]))],
            thought: "thought")
        let turns = [Message(.user, "the"), call, resultTurn(call.toolCalls[0], .string("in")), Message(.assistant, "us")]
        let whole = try JSONEncoder().encode(SavedChat(settings: ChatSettings(), turns: turns))
        let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        defer { try? FileManager.default.removeItem(at: folder) }
        let store = ChatStore(folder)
        let chats = folder.appendingPathComponent("chats")
        try FileManager.default.createDirectory(at: chats, withIntermediateDirectories: true)
        let use = { (file: Data) throws in
            try file.write(to: chats.appendingPathComponent("a.json"))
            if store.load().isEmpty { throw GemmaError.session("it is left out") }
        }
        try attack(whole, .bytes, 200, use)
        try attack(whole, .values, 200, use)
    }

    func testGoldens() throws {
        let use = { (file: Data) throws in
            for golden in try parseGoldens(file) {
                let rows = [[Float]](repeating: [Float](repeating: 0, count: 376), count: golden.judged)
                _ = (try compareLogits(rows, golden.quantized), try compareLogits(rows, golden.reference))
            }
        }
        try attack(file("goldens.json"), .bytes, 20, use)
        try attack(file("goldens.json"), .values, 20, use)
    }

    func testGrammars() throws {
        for item in try json(data.appendingPathComponent("grammar_vectors.json")).list({ $0 }).prefix(3) {
            let text = Array(try item.of("texts").list { try $0.of("text").string() }[0].utf8)
            let use = { (file: Data) throws in
                let grammar = try ByteGrammar(String(decoding: file, as: UTF8.self))
                var state = grammar.start
                for byte in text {  // as the app asks: for every byte that may come, then for the one that does
                    for other in UInt8.min...UInt8.max { _ = grammar.mayEnd(try grammar.after(state, other)) }
                    state = try grammar.after(state, byte)
                }
            }
            let whole = Data(try item.of("grammar").value.write().utf8)
            try attack(whole, .bytes, 100, use)
            try attack(whole, .values, 100, use)
        }
    }

    func testArchives() throws {
        let folder = try pythonsVectors()
        let library = BundleLibrary(
            folder: root.appendingPathComponent("Documents"), support: root.appendingPathComponent("Support"),
            compiled: root.appendingPathComponent("compiled"))
        try library.prepare()
        let copy = root.appendingPathComponent("copy.zip")
        let use = { (file: Data) throws in
            try file.write(to: copy)
            try library.delete(library.add(from: copy))
        }
        try attack(file("stored.zip", in: folder), .numbers, 15, use)
        try attack(file("deflated.zip", in: folder), .bytes, 5, use)
        try attack(file("large.zip", in: folder), .numbers, 10, use)
        XCTAssertEqual(library.bundles(), [])
        let incoming = root.appendingPathComponent("Support/incoming").path
        XCTAssertEqual((try? FileManager.default.contentsOfDirectory(atPath: incoming)) ?? [], [])
    }

    func testEmbeddingTables() throws {
        let folder = try pythonsVectors()
        let copy = root.appendingPathComponent("table.safetensors")
        for name in ["float", "int8", "zeros"] {
            let use = { (file: Data) throws in
                try file.write(to: copy)
                let table = try EmbeddingTable(copy, width: 64)
                for token in 0..<24 { _ = try table.row(token) }
            }
            try attack(file("table-\(name).safetensors", in: folder), .bytes, 100, use)
            try attack(file("table-\(name).safetensors", in: folder), .numbers, 100, use)
        }
    }

    func testAnErrorIsOneLineOfPrintableCharactersWhateverItQuotes() {
        XCTAssertEqual(oneLine(" a\n\t b\u{2028}\u{202E}c\0 "), "a b \\u202ec\\u0000")
        XCTAssertEqual(oneLine("é😀日本"), "é😀日本")
        XCTAssertEqual(oneLine(String(repeating: "x", count: 100_000)).count, 1503)
        XCTAssertEqual(GemmaError.session("no\r\n\u{1B}[31m").message, "no \\u001b[31m")
    }
}

private let mostSeconds = 5.0  // of a processor, for one file
private let mostBytes = 200e6  // that the peak grows by, over all mutations of a file

/// An engine of a model that always gives the same logits.
private struct Zeros: Engine {
    let runtime = "zeros"
    let givesEveryRow = true
    let vocabSize: Int

    func run(_ tokens: [Int], position: Int, rows: Int) throws -> [[Float]] {
        [[Float]](repeating: [Float](repeating: 0, count: vocabSize), count: rows)
    }
}

/// Peak memory of this process since it was last forgotten, in bytes; 0 where Linux doesn't tell it.
private func peakBytes() -> Double {
    let status = (try? String(contentsOfFile: "/proc/self/status", encoding: .utf8)) ?? ""
    let line = status.split(separator: "\n").first { $0.hasPrefix("VmHWM:") }
    return 1024 * (line?.split(separator: " ").dropFirst().first.flatMap { Double($0) } ?? 0)
}

private func forgetPeak() {
    try? Data("5".utf8).write(to: URL(fileURLWithPath: "/proc/self/clear_refs"))
}

/// The bytes with a number that sizes and counts are wrong with, of 1 to 8 bytes, mostly near the beginning or the end.
private func withNumber(_ whole: [UInt8], _ random: inout SeededRandom) -> [UInt8] {
    var bytes = whole
    let width = [1, 2, 4, 8][Int.random(in: 0..<4, using: &random)]
    let reach = min(bytes.count - width, Int.random(in: 0..<4, using: &random) == 0 ? .max : 1100)
    let distance = Int.random(in: 0...reach, using: &random)
    let at = Bool.random(using: &random) ? distance : bytes.count - width - distance
    let numbers: [UInt64] = [0, 1, .max, .max / 2, 0x7FFF_FFFF, 0x8000_0000, 0x10000, 0x7F, 0x80, random.next()]
    let number = numbers[Int.random(in: 0..<numbers.count, using: &random)]
    for index in 0..<width { bytes[at + index] = UInt8(truncatingIfNeeded: number >> (8 * UInt64(index))) }
    return bytes
}

private let hostile: [JSON] =
    [
        0, -1, 1, 0.5, 7, 73, 2_147_483_647, 2_147_483_648, 4_294_967_296, 9_007_199_254_740_992, 9_007_199_254_740_994,
        1e308, -1e308, 5e-324,
    ].map { .number($0) }
    + [
        "", "x", "../x", "/etc/hostname", "a\0b", "a\nb\u{202E}", String(repeating: "é", count: 2000),
        String(repeating: "x", count: 300), "local", "global", "decode", "model.onnx", "manifest.json", "float32", "tokens",
        "logits", "99999999999.1", "<bos>", "%s",
    ].map { .string($0) }
    + [
        .null, .boolean(true), .boolean(false), .array([]), .object(JSONObject([])),
        (0..<100).reduce(JSON.null) { inner, _ in .array([inner]) },
    ]

/// The value with one part replaced, left out, repeated or renamed.
private func altered(_ value: JSON, _ random: inout SeededRandom) -> JSON {
    let descends = Int.random(in: 0..<10, using: &random) > 0
    let how = Int.random(in: 0..<12, using: &random)
    switch value {
    case .object(let object) where descends && !object.fields.isEmpty:
        var fields = object.fields
        let at = Int.random(in: 0..<fields.count, using: &random)
        switch how {
        case 0: fields.remove(at: at)
        case 1: fields[at].name = ["", "../\(fields[at].name)", "a/b", "x\n"][Int.random(in: 0..<4, using: &random)]
        default: fields[at].value = altered(fields[at].value, &random)
        }
        return .object(JSONObject(fields))
    case .array(var items) where descends && !items.isEmpty:
        let at = Int.random(in: 0..<items.count, using: &random)
        switch how {
        case 0: items.remove(at: at)
        case 1: items += [JSON](repeating: items[at], count: Int.random(in: 0..<40, using: &random))
        default: items[at] = altered(items[at], &random)
        }
        return .array(items)
    default: return hostile[Int.random(in: 0..<hostile.count, using: &random)]
    }
}

/// Random numbers that are the same in each run (SplitMix64).
struct SeededRandom: RandomNumberGenerator {
    var state: UInt64

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var mixed = state
        mixed = (mixed ^ (mixed >> 30)) &* 0xBF58_476D_1CE4_E5B9
        mixed = (mixed ^ (mixed >> 27)) &* 0x94D0_49BB_1331_11EB
        return mixed ^ (mixed >> 31)
    }
}

/// The bytes with one to three damages: a byte changed, a range removed, the end cut off, or a range repeated.
func damaged(_ whole: [UInt8], _ random: inout SeededRandom) -> [UInt8] {
    var bytes = whole
    for _ in 0...Int.random(in: 0..<3, using: &random) {
        let reach = Bool.random(using: &random) ? bytes.count : min(bytes.count, 64)
        let at = Int.random(in: 0..<reach, using: &random)
        let end = min(bytes.count, at + Int.random(in: 1...20, using: &random))
        switch Int.random(in: 0..<4, using: &random) {
        case 0: bytes[at] = UInt8.random(in: 0...255, using: &random)
        case 1: bytes.removeSubrange(at..<end)
        case 2: bytes.removeSubrange(at...)
        default: bytes.insert(contentsOf: Array(bytes[at..<end]), at: at)
        }
        if bytes.isEmpty { bytes = [0] }
    }
    return bytes
}
