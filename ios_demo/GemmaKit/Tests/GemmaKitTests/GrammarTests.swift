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

    private func mask(_ grammar: ByteGrammar, _ state: Int) -> String {
        var bytes = [UInt8](repeating: 0, count: 32)
        for byte in UInt8.min...UInt8.max where grammar.after(state, byte) != ByteGrammar.nothing {
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
                let states = (0...bytes.count).map { grammar.follow(grammar.start, bytes.prefix($0)) }
                XCTAssertEqual(states.map { mask(grammar, $0) }, try vector.of("masks").list { try $0.string() })
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
        let allowed = (0..<vocabulary).filter(state.allows)
        XCTAssertGreaterThan(allowed.count, 100)
        XCTAssertTrue(allowed.allSatisfy { tokenizer.byte(of: $0) != nil || !tokenizer.text(of: $0).isEmpty })
        state.accept(try XCTUnwrap(allowed.last))
        XCTAssertEqual(Set((0..<vocabulary).filter(state.allows)).subtracting(allowed), [1, 5])
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
}

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
