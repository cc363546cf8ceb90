import Foundation
import XCTest

@testable import GemmaKit

final class ConversationTests: XCTestCase {
    private func conversation(_ session: Session) throws -> Conversation {
        Conversation(session, try tinyVoice(), Sampler(try Sampling()))
    }

    private func pieces(_ reply: Reply) async throws -> [String] {
        var found: [String] = []
        for try await piece in reply { found.append(piece) }
        return found
    }

    func testAReplyStreamsWholeCharactersAndEndsAtTheStopToken() async throws {
        let reply = try conversation(ScriptedSession.saying("é😀 the", tokenizer: tinyTokenizer())).send("hello")
        let found = try await pieces(reply)
        XCTAssertEqual(found.joined(), "é😀 the")
        XCTAssertTrue(found.contains("😀"))
        XCTAssertEqual(reply.reason, .stopToken)
    }

    func testTheNextTurnFeedsOnlyWhatTheCacheLacks() async throws {
        let session = try ScriptedSession.saying("in", "out", tokenizer: tinyTokenizer())
        let talk = try conversation(session)
        _ = try await pieces(talk.send("one"))
        _ = try await pieces(talk.send("two"))
        let voice = try tinyVoice()
        let turns = [Message(.user, "one"), Message(.assistant, "in"), Message(.user, "two")]
        let whole = try encodeChat(voice.tokenizer, voice.format, turns, bosToken: 2)
        XCTAssertEqual(Array(session.tokens.prefix(whole.count)), whole)
        XCTAssertEqual(session.fed.filter { $0.count > 1 }.map { $0[0] }, [2, 5])
    }

    func testATrimmedReplyEmptiesTheCache() async throws {
        let session = try ScriptedSession.saying("  in ", "out", tokenizer: tinyTokenizer())
        let talk = try conversation(session)
        _ = try await pieces(talk.send("one"))
        _ = try await pieces(talk.send("two"))
        XCTAssertEqual(session.fed.filter { $0[0] == 2 }.count, 2)
    }

    func testAStoppedReplyCountsAsFarAsItCame() async throws {
        let talk = try conversation(ScriptedSession.saying("the user in the inn", "so", tokenizer: tinyTokenizer()))
        let reply = try talk.send("one")
        let first = try await reply.next()
        XCTAssertEqual(first, "the")
        XCTAssertNil(reply.reason)
        XCTAssertEqual(talk.messages.last, Message(.assistant, "the"))
        _ = try talk.send("never asked")
        _ = try await pieces(talk.send("two"))
        XCTAssertEqual(talk.messages.prefix(3).map(\.content), ["one", "the", "two"])
    }

    func testACancelledTaskEndsTheReply() async throws {
        let talk = try conversation(ScriptedSession { _ in 300 })
        let reply = try talk.send("in")
        let task = Task { () -> Int in
            var count = 0
            do {
                for try await _ in reply {
                    count += 1
                    if count == 3 { withUnsafeCurrentTask { $0?.cancel() } }
                }
            } catch is CancellationError {
                return count
            }
            return -1
        }
        let count = try await task.value
        XCTAssertEqual(count, 3)
        XCTAssertNil(reply.reason)
    }

    func testAFullContextEndsTheReplyAndTheNextQuestionIsRefusedAndChangesNothing() async throws {
        let talk = try conversation(ScriptedSession(contextLength: 24) { _ in 300 })
        let reply = try talk.send("in")
        _ = try await pieces(reply)
        XCTAssertEqual(reply.reason, .context)
        let before = talk.messages
        XCTAssertThrowsError(try talk.send("more and more and more")) { error in
            guard case GemmaError.contextFull = error else { return XCTFail("\(error)") }
        }
        XCTAssertEqual(talk.messages, before)
        talk.reset()
        let short = try talk.send("in", maxNewTokens: 2)
        _ = try await pieces(short)
        XCTAssertEqual(short.reason, .length)
    }

    func testAnAnswerThatIsNotRightIsAskedAgainWithWhatWasWrong() async throws {
        let schema = try Schema(#"{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}"#)
        let talk = try conversation(
            ScriptedSession.saying("no idea", #"{"n": "x"}"#, #"Here: {"n": 3}"#, tokenizer: tinyTokenizer()))
        let answer = try await askStructured(talk, "count", schema)
        let right = StructuredResult.valid(.object(JSONObject([("n", .number(3))])))
        XCTAssertEqual(answer, StructuredAnswer(result: right, attempts: 3))
        XCTAssertEqual(answer.inWords, "The answer matches the schema (3 tries): {\"n\": 3}")
        XCTAssertTrue(talk.messages[4].content.contains("expected integer"))
        let stubborn = try conversation(ScriptedSession.saying("no", "{}", tokenizer: tinyTokenizer()))
        var shown: [String] = []
        let never = try await askStructured(stubborn, "count", schema, attempts: 2) { reply in
            shown.append(try await self.pieces(reply).joined())
        }
        XCTAssertEqual(shown, ["no", "{}"])
        let endless = try await askStructured(
            conversation(ScriptedSession { _ in 300 }), "count", schema, attempts: 1, maxNewTokens: 9
        ) { reply in
            _ = try await self.pieces(reply)
            XCTAssertEqual(reply.reason, .length)
        }
        XCTAssertTrue(endless.inWords.contains("no whole JSON"))
        XCTAssertEqual(never.inWords, "The answer does not match the schema (2 tries):\n- $: \"n\" is missing")
    }
}

final class TinyModelTests: XCTestCase {
    /// One engine, since the bridge's pipes are opened once.
    func testTheLoopSaysPythonsTokensAndTheGoldensGivePythonsFigures() async throws {
        let bundle = try ModelBundle.open(tiny)
        let session = EngineSession(try BridgeEngine(vocabSize: bundle.manifest.vocabSize), bundle.manifest)
        try await checkGreedyTokens(session)
        let found = try verify(session, loadGoldens(bundle), Limits())
        XCTAssertEqual(found.verdict, .pass)
        try checkFigures(vectors().of("verify").of("lowering"), found.lowering)
        try checkFigures(vectors().of("verify").of("quantization"), found.quantization)
        let workload = Workload(promptLengths: [4, 8], decodePrompt: 4, newTokens: 3)
        try checkReport(bundle, found, measureSpeed(session, vocabSize: bundle.manifest.vocabSize, workload, repeats: 2))
    }
}
