import Foundation
import XCTest

@testable import GemmaKit

/// Grammars that Python compiled; what they allow was taken from llguidance.
final class GrammarTests: XCTestCase {
    private let vocabulary = 360

    private func each(_ check: (JSONFields, ByteGrammar) async throws -> Void) async throws {
        let cases = try json(data.appendingPathComponent("grammar_vectors.json")).list { $0 }
        XCTAssertGreaterThan(cases.count, 8)
        for item in cases { try await check(item, try ByteGrammar(item.of("grammar").value)) }
    }

    private func mask(_ grammar: ByteGrammar, _ state: Int) throws -> String {
        var bytes = [UInt8](repeating: 0, count: 32)
        for byte in UInt8.min...UInt8.max where try grammar.after(state, byte) != ByteGrammar.nothing {
            bytes[Int(byte) / 8] |= 1 << (byte % 8)
        }
        return bytes.map { String(format: "%02x", $0) }.joined() + (grammar.mayEnd(state) ? "$" : "")
    }

    private func chat(seed: UInt64, _ sampling: Sampling? = nil) throws -> Conversation {
        let noise = SeededNoise(seed)
        let sampler = Sampler(try sampling ?? Sampling()) { noise.next() }
        return try Conversation(RandomSession(vocabulary, noise), try tinyCodec(), sampler)
    }

    func testEachBeginningOfATextAllowsWhatLlguidanceAllows() async throws {
        try await each { item, grammar in
            _ = try item.of("texts").list { vector in
                let bytes = Array(try vector.of("text").string().utf8)
                let states = try (0...bytes.count).map { try grammar.follow(grammar.start, bytes.prefix($0)) }
                XCTAssertEqual(try states.map { try mask(grammar, $0) }, try vector.of("masks").list { try $0.string() })
            }
        }
    }

    func testRandomLogitsGiveAValueOfTheSchema() async throws {
        let samplings = [
            try Sampling(), try Sampling(temperature: 1, topK: 5, topP: 0.9), try Sampling(temperature: 1),
        ]
        var complete = 0
        var cases = 0
        try await each { item, grammar in
            cases += 1
            let schema = try Schema(item.of("schema").value)
            for (seed, sampling) in samplings.enumerated() {
                let reply = try chat(seed: UInt64(seed), sampling).send("in", maxNewTokens: 150, grammar: grammar)
                for try await _ in reply {}
                if reply.reason == .length { continue }  // a string or array without an end
                XCTAssertEqual(schema.validate(try parseJSON(reply.text)), [], reply.text)
                complete += 1
            }
        }
        XCTAssertGreaterThan(complete, 2 * cases)
    }

    func testAGrammarHoldsOneReplyAndItsEndEndsTheReply() async throws {
        let grammar = try ByteGrammar(#"{"nodes": [["text", "in"], ["text", "the"], ["alt", 0, 1]], "start": 2}"#)
        let chat = try Conversation(ScriptedSession { _ in 300 }, try tinyCodec(), Sampler(try Sampling()))
        let reply = try chat.send("us", grammar: grammar)
        for try await _ in reply {}
        XCTAssertTrue(["in", "the"].contains(reply.text))
        XCTAssertEqual(reply.reason, .constraint)
        let free = try chat.send("us", maxNewTokens: 3)
        for try await _ in free {}
        XCTAssertEqual(free.reason, .length)
    }

    func testWithAGrammarTheFirstAnswerIsValid() async throws {
        let item = try json(data.appendingPathComponent("grammar_vectors.json")).list { $0 }[0]
        let grammar = try ByteGrammar(item.of("grammar").value)
        let schema = try Schema(item.of("schema").value)
        let answer = try await askStructured(chat(seed: 1), "who?", schema, grammar: grammar)
        XCTAssertEqual(answer.attempts, 1)
        guard case .valid = answer.result else { return XCTFail(answer.summary) }
    }

    func testNoControlTokenIsAllowedAndAStopTokenOnlyAtTheEnd() throws {
        let grammar = try ByteGrammar(#"{"nodes": [["bytes", [[0, 255]]], ["repeat", 0, 1, null]], "start": 1}"#)
        let tokenizer = try tinyTokenizer()
        let state = GrammarState(grammar, tokenizer, stopTokens: [1, 5])
        let allowed = try (0..<vocabulary).filter(state.allows)
        XCTAssertGreaterThan(allowed.count, 100)
        XCTAssertTrue(allowed.allSatisfy { tokenizer.byte(of: $0) != nil || !tokenizer.text(of: $0).isEmpty })
        try state.accept(XCTUnwrap(allowed.last))
        XCTAssertEqual(Set(try (0..<vocabulary).filter(state.allows)).subtracting(allowed), [1, 5])
    }

    func testADamagedGrammarIsRefused() {
        let damaged = [
            "[]", "{}", #"{"nodes": [], "start": 0}"#, #"{"nodes": [["text", "a"]], "start": 1}"#,
            #"{"nodes": [["text", 1]], "start": 0}"#, #"{"nodes": [["bytes", []]], "start": 0}"#,
            #"{"nodes": [["bytes", [[9, 8]]]], "start": 0}"#, #"{"nodes": [["bytes", [[0, 256]]]], "start": 0}"#,
            #"{"nodes": [["seq", 0]], "start": 0}"#, #"{"nodes": [["text", "a"], ["repeat", 0, 2, 1]], "start": 1}"#,
            #"{"nodes": [["text", "a"], ["repeat", 0]], "start": 1}"#, #"{"nodes": [["loop", 0]], "start": 0}"#,
        ]
        for text in damaged {
            XCTAssertThrowsError(try ByteGrammar(text), text) { error in
                guard case GemmaError.schema = error else { return XCTFail("\(error)") }
            }
        }
        XCTAssertThrowsError(try ByteGrammar("{"))
    }

    func testAFileOfAGrammarIsReadOrRefusedInOneLine() throws {
        func message(_ data: Data) -> String {
            do {
                _ = try GrammarFile(name: "a.json", data)
                return "none"
            } catch { return (error as? GemmaError)?.message ?? "\(error)" }
        }
        let file = try GrammarFile(name: "a\n\(String(repeating: "b", count: 100)).json", Data(inn.utf8))
        XCTAssertEqual(file.name.count, 60)
        XCTAssertTrue(file.name.hasPrefix("a bbb"))
        XCTAssertEqual(file, try GrammarFile(name: file.name, text: inn))
        let refused = [
            (Data(inn.utf8) + Data(repeating: 32, count: 1 << 18), "a.json has more than 262144 bytes"),
            (Data([0x22, 0xFF, 0x22]), "a.json is not UTF-8"),
            (Data("{".utf8), "a.json is not JSON: "),
            (
                Data(#"{"type": "object"}"#.utf8),
                "a.json: the grammar is not valid: it has no nodes; run gemma-runtime compile-schema again"
            ),
        ]
        for (data, text) in refused { XCTAssertTrue(message(data).contains(text), message(data)) }
        let place = FileManager.default.temporaryDirectory.appendingPathComponent("\(UUID().uuidString).json")
        defer { try? FileManager.default.removeItem(at: place) }
        for (data, text) in refused.prefix(2) {
            try data.write(to: place)
            XCTAssertThrowsError(try GrammarFile(place)) {
                XCTAssertTrue("\($0)".contains(text.dropFirst(6)), "\($0)")
            }
        }
        try Data(inn.utf8).write(to: place)
        XCTAssertEqual(try GrammarFile(place).text, inn)
        XCTAssertThrowsError(try GrammarFile(place.appendingPathComponent("nowhere")))
    }

    func testAFormatHoldsAnswersAndSaysWhetherItIsGuaranteed() async throws {
        let grammar = try GrammarFile(name: "a.json", text: inn)
        let cut = try GrammarFile(name: "cut.json", text: #"{"nodes": [["text", "i"], ["repeat", 0, 9999, null]], "start": 1}"#)
        func ask(_ format: AnswerFormat) async throws -> (reply: Reply, outcome: String?, midway: String?) {
            var last: Reply?
            var midway: String?
            let chat = try Conversation(ScriptedSession { _ in 300 }, try tinyCodec(), Sampler(try Sampling()))
            let outcome = try await askFormatted(chat, "who?", format) { reply, event in
                if case .piece = event, last == nil {
                    last = reply
                    midway = guarantee(format, reply)
                }
                if event == .began { XCTAssertNil(guarantee(format, reply)) }
            }
            return (try XCTUnwrap(last), outcome, midway)
        }
        let held = try await ask(AnswerFormat(grammar: grammar))
        XCTAssertEqual(held.reply.text, "in")
        XCTAssertNil(held.outcome)
        XCTAssertEqual(guarantee(AnswerFormat(grammar: grammar), held.reply), "The format is guaranteed by a.json.")
        let long = try await ask(AnswerFormat(grammar: cut))
        XCTAssertEqual(long.reply.tokens.count, 512)
        XCTAssertEqual(long.reply.reason, .length)
        let said = "The answer was cut, so it doesn't have the format of cut.json."
        XCTAssertEqual(guarantee(AnswerFormat(grammar: cut), long.reply), said)
        XCTAssertEqual(long.midway, said)
        XCTAssertNil(guarantee(AnswerFormat(), held.reply))
        let quoted = try GrammarFile(name: "b.json", text: #"{"nodes": [["text", "\"in\""]], "start": 0}"#)
        let both = try await ask(AnswerFormat(schema: #"{"type": "string"}"#, grammar: quoted))
        XCTAssertEqual(both.outcome, #"The answer matches the schema (first try): "in""#)
    }

    func testTheInputSaysWhatIsAskedFor() throws {
        let grammar = try GrammarFile(name: "a.json", text: inn)
        let formats = try [(" ", nil), ("{}", nil), ("\n", grammar), ("{}", grammar)].map {
            try AnswerFormat(schema: $0, grammar: $1)
        }
        XCTAssertEqual(
            formats.map(\.hint), ["Ask something", "Ask for JSON", "Ask for JSON as in a.json", "Ask for JSON as in a.json"])
        XCTAssertEqual(formats.map(\.schemaText), [exampleSchema, "{}", "", "{}"])
        XCTAssertThrowsError(try AnswerFormat(schema: "[]", grammar: grammar))
        XCTAssertThrowsError(try AnswerFormat(schema: "{", grammar: nil))
    }

    /// They overflowed the stack, or took all memory.
    func testAGrammarThatIsTooDeepOrGrowsWithoutEndIsRefused() {
        func grammar(_ nodes: [String]) -> String {
            #"{"nodes": [["text", "a"], \#(nodes.joined(separator: ", "))], "start": \#(nodes.count)}"#
        }
        let hostile = [
            grammar((0...100_000).map { #"["repeat", \#($0), 0, 2]"# }),  // nested
            grammar([#"["repeat", 0, 0, 1]"#, #"["seq"\#(String(repeating: ", 1", count: 100_000))]"#]),  // any may be left out
            grammar((0...60).map { #"["seq", \#($0), \#($0)]"# }),  // 2 to the power of 61
            grammar(
                (0..<7000).map { #"["text", "\#($0)"]"# } + [
                    #"["alt"\#((1...7000).map { ", \($0)" }.joined())]"#,
                    #"["alt"\#(String(repeating: ", 7001", count: 20_000))]"#,
                ]),  // 140 million cases
            // The 30th byte before the end is an a: a state for each set of places.
            grammar([
                #"["bytes", [[97, 98]]]"#, #"["repeat", 1, 0, null]"#, #"["repeat", 1, 30, 30]"#, #"["seq", 2, 0, 3]"#,
            ]),
        ]
        for text in hostile {
            var random = SeededRandom(state: 1)
            let bytes = (0..<100_000).map { _ in UInt8.random(in: 97...98, using: &random) }
            XCTAssertThrowsError(
                try {
                    let grammar = try ByteGrammar(text)
                    _ = try grammar.follow(grammar.start, bytes)
                }()
            ) { XCTAssertTrue(($0 as? GemmaError)?.message.contains("too large") == true, "\($0)") }
        }
    }
}

private let inn = #"{"nodes": [["text", "in"]], "start": 0}"#

private final class SeededNoise {
    private var random: SeededRandom

    init(_ seed: UInt64) { random = SeededRandom(state: seed) }

    func next() -> Double { Double.random(in: 0..<1, using: &random) }
}

/// A session with random logits.
private final class RandomSession: Session {
    let contextLength = 4096
    private let vocabulary: Int
    private let noise: SeededNoise
    private(set) var position = 0

    init(_ vocabulary: Int, _ noise: SeededNoise) {
        self.vocabulary = vocabulary
        self.noise = noise
    }

    func prefill(_ tokens: [Int]) throws -> [Float] {
        try checkRoom(position, tokens.count, contextLength)
        position += tokens.count
        return (0..<vocabulary).map { _ in Float(noise.next() * 9) }
    }

    func score(_ tokens: [Int]) throws -> [[Float]] { try tokens.map { try prefill([$0]) } }

    func rewind(to target: Int) throws -> Int {
        position = target
        return position
    }

    func reset() { position = 0 }
}
