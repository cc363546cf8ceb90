import Foundation
import XCTest

@testable import GemmaKit

/// Checks results against those of the Python runtime.
final class VectorsTests: XCTestCase {
    func testEncodingTextGivesPythonsIdsAndDecodingGivesPythonsText() throws {
        try checkEncode(tinyTokenizer(), vectors().of("encode"), least: 1)
    }

    func testAUsersTextCantBecomeATokenAroundCallsWhichIsNotSpecial() throws {
        let file = data.appendingPathComponent("calls/tokenizer.gtok")
        let tokenizer = try Tokenizer(Data(contentsOf: file))
        try checkEncode(tokenizer, vectors().of("encode_calls"), least: 1)
    }

    func testEncodingATemplateGivesPythonsIds() throws {
        let tokenizer = try tinyTokenizer()
        _ = try vectors().of("encode_control").list { vector in
            let text = try vector.of("text").string()
            XCTAssertEqual(try tokenizer.encodeTemplate(text), try vector.of("ids").ints(), text)
        }
    }

    func testStreamedTokensGivePythonsPieces() throws {
        try checkDecode(tinyTokenizer(), vectors().of("decode"))
    }

    func testEncodingConversationsGivesPythonsIds() throws {
        let codec = try tinyCodec()
        _ = try vectors().of("chat").list { vector in
            let messages = try readMessages(vector)
            let ids = try encodeChat(codec.tokenizer, codec.format, messages)
            XCTAssertEqual(ids, try vector.of("ids").ints(), "\(messages)")
        }
    }

    func testEncodingGemma4sConversationsWithAndWithoutThinkingGivesPythonsIds() throws {
        let tokenizer = try gemma4Codec().tokenizer
        let format = try gemma4Codec().format
        _ = try vectors().of("gemma4").of("chat").list { vector in
            let thinking = try vector.of("thinking").boolean()
            let used = thinking ? try XCTUnwrap(format.thinking) : format
            let ids = try encodeChat(tokenizer, used, readMessages(vector))
            XCTAssertEqual(ids, try vector.of("ids").ints(), "thinking: \(thinking)")
        }
    }

    func testThoughtsAreToldFromTheAnswerAsInPython() throws {
        let tokenizer = try gemma4Codec().tokenizer
        let checked = try vectors().of("gemma4").of("thoughts").list { vector -> Bool in
            var (stream, thoughts) = (StreamDecoder(tokenizer), Thoughts(tokenizer))
            let pieces = try vector.of("ids").ints().map { token in
                let piece = stream.push(token)
                return thoughts.take(token, piece) ? "" : piece
            }
            XCTAssertEqual(pieces.scalars, try vector.of("pieces").list { try $0.string() }.scalars)
            let rest = thoughts.end(stream.flush())
            XCTAssertEqual(
                [rest, thoughts.text].scalars, try [vector.of("flush").string(), vector.of("thought").string()].scalars)
            return !thoughts.text.isEmpty
        }
        XCTAssertGreaterThan(checked.filter { $0 }.count, 4)
    }

    func testTheSameNoiseSamplesPythonsTokens() throws {
        _ = try vectors().of("sampler").list { vector in
            let sampling = try readSampling(vector.of("sampling"))
            let noise = try vector.of("noise").double()
            let logits = try vector.of("logits").list { Float(try $0.double()) }
            let token = try Sampler(sampling) { noise }.pick(logits, previous: vector.of("previous").ints())
            XCTAssertEqual(token, try vector.of("token").count(), "\(sampling)")
        }
    }

    func testTheSameSeedSamplesPythonsTokens() throws {
        _ = try vectors().of("seeds").list { vector in
            let seed = try XCTUnwrap(UInt64(vector.of("seed").string()))
            var (noise, drawn) = (SeededNoise(seed: seed), SeededNoise(seed: seed))
            XCTAssertEqual((0..<8).map { _ in noise.next() }, try vector.of("noise").list { try $0.double() })
            let sampler = Sampler(try readSampling(vector.of("sampling"))) { drawn.next() }
            let logits = try vector.of("logits").list { Float(try $0.double()) }
            let tokens = try vector.of("tokens").ints()
            XCTAssertEqual(try tokens.map { _ in try sampler.pick(logits, previous: []) }, tokens, "seed \(seed)")
            let seeded = Sampler(try readSampling(vector.of("sampling")), seed: seed)
            for _ in 0..<2 {  // replies
                let reply = seeded.forReply()
                XCTAssertEqual(try tokens.map { _ in try reply.pick(logits, previous: []) }, tokens, "seed \(seed)")
            }
        }
    }

    func testGemma2sAnd3sOwnTokenizersEqualPythonsOnThousandsOfTexts() throws {
        guard let folder = ProcessInfo.processInfo.environment["GEMMA_GENUINE"] else {
            throw XCTSkip("the tokenizers of Gemma 2 and 3 are not available")
        }
        for family in ["gemma2", "gemma3"] {
            let vocabulary = URL(fileURLWithPath: folder).appendingPathComponent(family)
            let tokenizer = try Tokenizer(Data(contentsOf: vocabulary.appendingPathComponent("tokenizer.gtok")))
            let expected = try json(vocabulary.appendingPathComponent("vectors.json"))
            try checkEncode(tokenizer, expected.of("encode"), least: 4000)
            try checkDecode(tokenizer, expected.of("decode"))
        }
    }

    private func readMessages(_ vector: JSONFields) throws -> [Message] {
        try vector.of("messages").list { message in
            Message(try XCTUnwrap(Role(rawValue: message.of("role").string())), try message.of("content").string())
        }
    }

    private func checkEncode(_ tokenizer: Tokenizer, _ expected: JSONFields, least: Int) throws {
        let checked = try expected.list { vector -> Bool in
            let text = try vector.of("text").string()
            let ids = try tokenizer.encode(text)
            XCTAssertEqual(ids, try vector.of("ids").ints(), text)
            XCTAssertEqual(Array(tokenizer.decode(ids).utf8), Array(try vector.of("decoded").string().utf8))
            return true
        }
        XCTAssertGreaterThanOrEqual(checked.count, least)
    }

    private func checkDecode(_ tokenizer: Tokenizer, _ expected: JSONFields) throws {
        _ = try expected.list { vector in
            var stream = StreamDecoder(tokenizer)
            let pieces = try vector.of("ids").ints().map { stream.push($0) }
            XCTAssertEqual(pieces.scalars, try vector.of("pieces").list { try $0.string() }.scalars)
            XCTAssertEqual(Array(stream.flush().utf8), Array(try vector.of("flush").string().utf8))
        }
    }
}
