import Foundation
import XCTest

@testable import GemmaKit

/// The folder `tests/data` of the repository.
let data = URL(fileURLWithPath: #filePath).pathComponents.dropLast(5).reduce(URL(fileURLWithPath: "/")) {
    $1 == "/" ? $0 : $0.appendingPathComponent($1)
}.appendingPathComponent("tests/data")
let tiny = data.appendingPathComponent("tiny")

func json(_ path: URL) throws -> JSONFields { try JSONFields.parse(file: path.lastPathComponent, Data(contentsOf: path)) }

func vectors() throws -> JSONFields { try json(data.appendingPathComponent("phone_vectors.json")) }

func tinyTokenizer() throws -> Tokenizer { try Tokenizer(Data(contentsOf: tiny.appendingPathComponent("tokenizer.gtok"))) }

func tinyCodec() throws -> ChatCodec {
    let format = try ChatFormat(Data(contentsOf: tiny.appendingPathComponent("chat.json")))
    return ChatCodec(tokenizer: try tinyTokenizer(), format: format, stopTokens: [1, 5])
}

/// The small tokenizer under Gemma 4's names, and its chat format.
func gemma4Codec() throws -> ChatCodec {
    let folder = data.appendingPathComponent("gemma4")
    let tokenizer = try Tokenizer(Data(contentsOf: folder.appendingPathComponent("tokenizer.gtok")))
    let format = try ChatFormat(Data(contentsOf: folder.appendingPathComponent("chat.json")))
    return ChatCodec(tokenizer: tokenizer, format: format, stopTokens: [1, 5])
}

/// A folder with what `tests/data/ios_vectors.py` wrote; skips the test if Python could not be run.
func pythonsVectors() throws -> URL {
    guard let folder = ProcessInfo.processInfo.environment["GEMMA_IOS_VECTORS"] else {
        throw XCTSkip("Python's vectors for this test are not available")
    }
    return URL(fileURLWithPath: folder)
}

extension JSONFields {
    func ints() throws -> [Int] { try list { try $0.count() } }
}

extension Array where Element == String {
    /// As Unicode scalars.
    var scalars: [[UInt32]] { map { $0.unicodeScalars.map(\.value) } }
}

/// Checks the 64 greedy tokens against those of `gemma-runtime`.
func checkGreedyTokens(_ session: Session) async throws {
    let expected = try json(data.appendingPathComponent("tiny_tokens.json"))
    let request = GenerationRequest(prompt: try expected.of("prompt").ints(), maxNewTokens: 64, stopTokens: [])
    var tokens: [Int] = []
    for try await token in try TokenGeneration(session, request, Sampler(try Sampling())) { tokens.append(token) }
    XCTAssertEqual(tokens, try expected.of("tokens").ints())
    XCTAssertEqual(tokens.count, 64)
}

/// An answer in an earlier place equals that of a new conversation with the same messages, whether or not the caches go
/// back.
func checkAnswersInEarlierPlaces(_ session: Session, _ codec: ChatCodec) async throws {
    var goesBack: [Bool] = []
    for (answers, place, edit) in [(2, 2, "the user"), (3, 2, "in the inn"), (1, 0, "us")] {
        func conversation(_ turns: [Message]) throws -> Conversation {
            try Conversation(session, codec, Sampler(try Sampling()), turns: turns)
        }
        let chat = try conversation([])
        for answer in 0..<answers { _ = try await chat.answer("in the inn, the user", at: 2 * answer) }
        let before = chat.turns
        let reply = try chat.send(edit, at: place, maxNewTokens: 4)
        goesBack.append(session.position > 0)  // before any of the new tokens is fed
        try await reply.run()
        let fresh = try conversation(Array(before[..<place]))
        let expected = try await fresh.answer(edit, at: place)
        XCTAssertEqual(expected, reply.tokens)
        XCTAssertEqual(fresh.turns, chat.turns)
        let again = try await chat.answer(edit, at: try XCTUnwrap(lastQuestion(chat.turns)))
        XCTAssertEqual(again, reply.tokens, "the same question once more, greedily")
        XCTAssertEqual(fresh.turns, chat.turns)
    }
    XCTAssertEqual(goesBack, [true, false, true])
}

extension Conversation {
    func answer(_ question: String, at place: Int) async throws -> [Int] {
        let reply = try send(question, at: place, maxNewTokens: 4)
        try await reply.run()
        return reply.tokens
    }
}

func checkFigures(_ expected: JSONFields, _ actual: Agreement) throws {
    XCTAssertEqual(actual.positions, try expected.of("positions").count())
    XCTAssertEqual(actual.nearTies, try expected.of("near_ties").count())
    XCTAssertEqual(actual.top1, try expected.of("top1").double(), accuracy: 1e-9)
    let figures = [
        ("max_abs", actual.maxAbs), ("mean_abs", actual.meanAbs), ("mean_kl", actual.meanKL), ("p99_kl", actual.p99KL),
    ]
    for (name, value) in figures {
        let figure = try expected.of(name).double()
        XCTAssertEqual(value, figure, accuracy: 1e-3 * figure + 1e-5, name)
    }
}

/// The shared JSON has the field names of `gemma-runtime verify --json` and `bench --json`.
func checkReport(_ bundle: ModelBundle, _ verification: Verification, _ benchmark: Benchmark) throws {
    let loading = Loading(checkMs: 1, loadMs: 2)
    let spans = [
        Span(seconds: 5, tokensPerSecond: 16, condition: Condition(thermal: "fair", memoryBytes: 123)),
        Span(seconds: 10, tokensPerSecond: 8, condition: Condition(thermal: nil, memoryBytes: nil)),
    ]
    let sustained = Sustained(minutes: 1, roundTokens: 8, promptTokens: 4, newTokens: 80, spans: spans)
    let report = try reportJSON(device: ["name": "Linux"], bundle, verification, loading, benchmark, sustained)
    XCTAssertEqual(try parseJSON(report.write()), report)
    let names = try vectors().of("fields").map { try $0.list { try $0.string() } }
    let verify = try report.field("verify")
    XCTAssertEqual(verify.names, names["Verification"])
    XCTAssertEqual(try verify.field("limits").names, names["Limits"])
    XCTAssertEqual(try verify.field("lowering").names, names["Agreement"])
    XCTAssertEqual(try verify.field("by_golden").names, try loadGoldens(bundle).map(\.name))
    let bench = try report.field("bench")
    let figures = try bench.field("bundles").first()
    XCTAssertEqual(Set(bench.names).subtracting(names["Benchmark"] ?? []), [])
    XCTAssertEqual(Set(figures.names).subtracting(names["BundleFigures"] ?? []), [])
    XCTAssertEqual(try figures.field("prompts").first().names, names["PromptFigures"])
    XCTAssertEqual(try figures.field("token_ms").names, names["Spread"])
    XCTAssertEqual(try report.field("digest"), .string(try bundle.digest()))
    // As in the report that gemma-runtime report is tested with.
    let recorded = try json(data.appendingPathComponent("report/phone.json")).value
    XCTAssertEqual(report.names, recorded.names)
    let (mine, its) = (try report.field("sustained"), try recorded.field("sustained"))
    XCTAssertEqual(mine.names, its.names)
    XCTAssertEqual(try mine.field("spans").first().names, try its.field("spans").first().names)
}

extension JSON {
    func field(_ name: String) throws -> JSON {
        guard case .object(let object) = self else { throw GemmaError.json("not an object") }
        return try XCTUnwrap(object[name], name)
    }

    func first() throws -> JSON {
        guard case .array(let items) = self else { throw GemmaError.json("not an array") }
        return try XCTUnwrap(items.first)
    }

    var names: [String] {
        guard case .object(let object) = self else { return [] }
        return object.fields.map(\.name)
    }
}

/// A session without a model: `script` returns the next token for the tokens so far.
final class ScriptedSession: Session {
    let contextLength: Int
    private let script: ([Int]) -> Int
    private(set) var tokens: [Int] = []
    private(set) var fed: [[Int]] = []  // the tokens of each call

    init(contextLength: Int = 4096, _ script: @escaping ([Int]) -> Int) {
        self.contextLength = contextLength
        self.script = script
    }

    /// Generates these replies in order, each followed by `<end_of_turn>`.
    static func replying(
        _ replies: String..., tokenizer: Tokenizer, contextLength: Int = 4096
    ) throws -> ScriptedSession {
        var remaining = try replies.flatMap { try tokenizer.encode($0) + [5] }
        return ScriptedSession(contextLength: contextLength) { _ in remaining.removeFirst() }
    }

    var position: Int { tokens.count }

    func prefill(_ new: [Int]) throws -> [Float] {
        try checkRoom(position, new.count, contextLength)
        fed.append(new)
        tokens += new
        var logits = [Float](repeating: 0, count: 400)
        logits[script(tokens)] = 1
        return logits
    }

    func score(_ tokens: [Int]) throws -> [[Float]] { try tokens.map { try prefill([$0]) } }

    func rewind(to target: Int) throws -> Int {
        tokens.removeSubrange(target...)
        return position
    }

    func reset() {
        tokens = []
    }
}

/// The Python runtime's session of the tiny bundle, behind two named pipes.
final class BridgeEngine: Engine, @unchecked Sendable {
    let runtime = "gemma_runtime"
    let givesEveryRow = true
    private let vocabSize: Int
    private let questions: FileHandle
    private let answers: FileHandle

    init(vocabSize: Int) throws {
        self.vocabSize = vocabSize
        guard let folder = ProcessInfo.processInfo.environment["GEMMA_BRIDGE"] else {
            throw XCTSkip("there is no bridge to the Python runtime to run the model")
        }
        questions = try XCTUnwrap(FileHandle(forWritingAtPath: folder + "/questions"))
        answers = try XCTUnwrap(FileHandle(forReadingAtPath: folder + "/answers"))
    }

    func run(_ tokens: [Int], position: Int, rows: Int) throws -> [[Float]] {
        let line = ([position, rows] + tokens).map(String.init).joined(separator: " ") + "\n"
        try questions.write(contentsOf: Data(line.utf8))
        var answer = Data()
        while answer.last != UInt8(ascii: "\n") {
            let part = answers.availableData  // returns what has arrived; read(upToCount:) would wait for more
            if part.isEmpty { throw GemmaError.session("the bridge ended") }
            answer += part
        }
        let bytes = try XCTUnwrap(Data(base64Encoded: answer.dropLast()))
        let floats = bytes.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
        return (0..<rows).map { Array(floats[$0 * vocabSize..<($0 + 1) * vocabSize]) }
    }
}
