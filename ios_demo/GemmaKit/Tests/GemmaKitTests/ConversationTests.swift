import Foundation
import XCTest

@testable import GemmaKit

/// A session after which all of 400 tokens are as likely.
private final class EvenSession: Session {
    let contextLength = 96
    private(set) var position = 0

    func prefill(_ tokens: [Int]) throws -> [Float] {
        position += tokens.count
        return [Float](repeating: 0, count: 400)
    }

    func score(_ tokens: [Int]) throws -> [[Float]] { try tokens.map { try prefill([$0]) } }

    func rewind(to target: Int) throws -> Int {
        position = target
        return position
    }

    func reset() { position = 0 }
}

final class ConversationTests: XCTestCase {
    private func conversation(_ session: Session) throws -> Conversation {
        try Conversation(session, tinyCodec(), Sampler(try Sampling()))
    }

    private func pieces(_ reply: Reply) async throws -> [String] {
        var pieces: [String] = []
        for try await piece in reply { pieces.append(piece) }
        return pieces
    }

    func testAReplyStreamsWholeCharactersAndEndsAtTheStopToken() async throws {
        let reply = try conversation(ScriptedSession.replying("é😀 the", tokenizer: tinyTokenizer())).send("hello")
        let pieces = try await pieces(reply)
        XCTAssertEqual(pieces.joined(), "é😀 the")
        XCTAssertTrue(pieces.contains("😀"))
        XCTAssertEqual(reply.reason, .stopToken)
    }

    func testTheNextTurnFeedsOnlyWhatTheCacheLacks() async throws {
        let session = try ScriptedSession.replying("in", "out", tokenizer: tinyTokenizer())
        let chat = try conversation(session)
        _ = try await pieces(chat.send("one"))
        _ = try await pieces(chat.send("two"))
        let codec = try tinyCodec()
        let turns = [Message(.user, "one"), Message(.assistant, "in"), Message(.user, "two")]
        let whole = try encodeChat(codec.tokenizer, codec.format, turns)
        XCTAssertEqual(Array(session.tokens.prefix(whole.count)), whole)
        XCTAssertEqual(session.fed.filter { $0.count > 1 }.map { $0[0] }, [2, 5])
    }

    func testAfterATrimmedReplyOnlyWhatDiffersIsFed() async throws {
        let session = try ScriptedSession.replying("  in ", "out", tokenizer: tinyTokenizer())
        let chat = try conversation(session)
        _ = try await pieces(chat.send("one"))
        _ = try await pieces(chat.send("two"))
        XCTAssertEqual(session.fed.filter { $0[0] == 2 }.count, 1)
        let codec = try tinyCodec()
        let whole = try encodeChat(codec.tokenizer, codec.format, chat.messages.dropLast())
        XCTAssertEqual(Array(session.tokens.prefix(whole.count)), whole)
    }

    func testAStoppedReplyCountsWithTheTextItHas() async throws {
        let chat = try conversation(ScriptedSession.replying("the user in the inn", "so", tokenizer: tinyTokenizer()))
        let reply = try chat.send("one")
        let first = try await reply.next()
        XCTAssertEqual(first, "the")
        XCTAssertNil(reply.reason)
        XCTAssertEqual(chat.messages.last, Message(.assistant, "the"))
        _ = try chat.send("never asked")
        _ = try await pieces(chat.send("two"))
        XCTAssertEqual(chat.messages.prefix(3).map(\.content), ["one", "the", "two"])
    }

    func testACancelledTaskEndsTheReply() async throws {
        let chat = try conversation(ScriptedSession { _ in 300 })
        let reply = try chat.send("in")
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

    func testAFullContextEndsTheReplyAndRefusingTheNextQuestionChangesNothing() async throws {
        let chat = try conversation(ScriptedSession(contextLength: 24) { _ in 300 })
        let reply = try chat.send("in")
        _ = try await pieces(reply)
        XCTAssertEqual(reply.reason, .context)
        let before = chat.messages
        XCTAssertThrowsError(try chat.send("more and more and more")) { error in
            guard case GemmaError.contextFull = error else { return XCTFail("\(error)") }
        }
        XCTAssertEqual(chat.messages, before)
        chat.reset()
        let short = try chat.send("in", maxNewTokens: 2)
        _ = try await pieces(short)
        XCTAssertEqual(short.reason, .length)
    }

    func testARollingChatForgetsTheOldestTurnsAndGoesOnAsANewOneThatBeginsWithTheKeptTurns() async throws {
        let session = try ScriptedSession.replying(
            "the inn", "the inn", "the inn", "the inn", "the inn", "the inn", "the inn", "the inn",
            tokenizer: tinyTokenizer(), contextLength: 96)
        let codec = try tinyCodec()
        let chat = try Conversation(session, codec, Sampler(try Sampling()), system: "be brief", roll: true)
        var forgotten = 0
        for turn in 0..<8 {
            let reply = try chat.send("question \(turn)")
            _ = try await pieces(reply)
            forgotten += reply.forgotten
        }
        XCTAssertGreaterThan(forgotten, 0)
        XCTAssertEqual(chat.messages.count, 17 - forgotten)
        XCTAssertEqual(chat.messages.first?.content, "be brief")
        XCTAssertEqual(chat.messages.dropLast().last?.content, "question 7")
        let fresh = try encodeChat(codec.tokenizer, codec.format, chat.messages.dropLast())
        XCTAssertEqual(Array(session.tokens.prefix(fresh.count)), fresh)
        let before = chat.messages
        XCTAssertThrowsError(try chat.send(String(repeating: "more ", count: 90)))
        XCTAssertEqual(chat.messages, before)
    }

    func testAQuestionInAnEarlierPlaceReplacesWhatFollowsOnceItsReplyBegins() async throws {
        let session = try ScriptedSession.replying("in", "out", "er", "us", "the", tokenizer: tinyTokenizer())
        let codec = try tinyCodec()
        let chat = try Conversation(session, codec, Sampler(try Sampling()), system: "be brief")
        for question in ["one", "two"] { _ = try await pieces(chat.send(question)) }
        let before = chat.turns
        _ = try chat.send("never answered", at: 0)
        XCTAssertEqual(chat.turns, before)
        for index in [-1, 1, 3, 5] { XCTAssertThrowsError(try chat.send("x", at: index)) }
        XCTAssertThrowsError(try chat.send(String(repeating: "more ", count: 3000), at: 2))
        XCTAssertEqual(chat.turns, before)
        _ = try await pieces(chat.send("three", at: 2))
        XCTAssertEqual(chat.turns.map(\.content), ["one", "in", "three", "er"])
        _ = try await pieces(chat.send("three", at: 2))
        _ = try await pieces(chat.send("four", at: 4))
        XCTAssertEqual(chat.messages.map(\.content), ["be brief", "one", "in", "three", "us", "four", "the"])
        let whole = try encodeChat(codec.tokenizer, codec.format, chat.messages.dropLast())
        XCTAssertEqual(Array(session.tokens.prefix(whole.count)), whole)
        XCTAssertEqual(session.fed.filter { $0[0] == 2 }.count, 1, "the beginning was fed once")
    }

    func testAPlaceAmongForgottenTurnsBringsBackThoseBeforeItAndAnAnswerAgainDrawsOtherTokens() async throws {
        let session = ScriptedSession(contextLength: 96) { $0[$0.count - 1] >= 300 ? 5 : 300 }
        let chat = try Conversation(session, tinyCodec(), Sampler(try Sampling()), roll: true)
        for turn in 0..<8 { _ = try await pieces(chat.send("question \(turn)")) }
        XCTAssertEqual(chat.turns.count, 16)
        XCTAssertGreaterThan(chat.forgotten, 2)
        let before = chat.turns
        _ = try chat.send("never answered", at: 2)
        XCTAssertEqual(chat.turns, before)
        XCTAssertGreaterThan(chat.forgotten, 2)
        _ = try await pieces(chat.send("again", at: 2))
        XCTAssertEqual(chat.turns, before[..<2] + [Message(.user, "again"), before[1]])
        XCTAssertEqual(chat.forgotten, 0)
        var noise = [0.2, 0.8]
        let sampler = Sampler(try Sampling(temperature: 1)) { noise.removeFirst() }
        let sampled = try Conversation(EvenSession(), tinyCodec(), sampler)
        let replies = [try await firstToken(sampled), try await firstToken(sampled)]
        XCTAssertEqual(replies, [80, 320])
    }

    private func firstToken(_ chat: Conversation) async throws -> Int? {
        let reply = try chat.send("in", at: 0, maxNewTokens: 1)
        _ = try await pieces(reply)
        return reply.tokens.first
    }

    func testThoughtsStreamApartAndAreLeftOutOfTheHistory() async throws {
        let codec = try gemma4Codec()
        let thought = try codec.tokenizer.encodeTemplate("<|channel>thought\nin the<channel|>")
        var script = thought + (try codec.tokenizer.encode("user")) + [5] + (try codec.tokenizer.encode("out")) + [5]
        let session = ScriptedSession { _ in script.removeFirst() }
        let chat = try Conversation(session, codec, Sampler(try Sampling()), system: "be brief", thinking: true)
        let reply = try chat.send("one")
        var thinking: [Bool] = []
        for try await piece in reply {
            thinking.append(reply.isThinking)
            if reply.isThinking { XCTAssertEqual(piece, "") }
        }
        XCTAssertEqual([reply.thought, reply.text], ["in the", "user"])
        XCTAssertEqual(thinking.filter { $0 }.count, thought.count - 1)
        XCTAssertEqual(chat.messages.map(\.content), ["be brief", "one", "user"])
        _ = try await pieces(chat.send("two"))
        let format = try XCTUnwrap(codec.format.thinking)
        let whole = try encodeChat(codec.tokenizer, format, chat.messages.dropLast())
        XCTAssertEqual(Array(session.tokens.prefix(whole.count)), whole)
        XCTAssertFalse(session.tokens.dropFirst(whole.count - 8).contains(thought[0]))
    }

    func testASeedIsReadFromTextAndABadOneIsRefused() throws {
        XCTAssertEqual(try [" ", "0", "2147483647"].map(parseSeed), [nil, 0, 2_147_483_647])
        for text in ["-1", "1.5", "2147483648", "x"] {
            XCTAssertThrowsError(try parseSeed(text)) { error in
                XCTAssertTrue((error as? GemmaError)?.message.contains("seed is \"\(text)\"") == true, "\(error)")
            }
        }
        let seedless = #"{"system":"","thinking":false,"roll":false,"seed":-1}"#
        XCTAssertThrowsError(try JSONDecoder().decode(ChatSettings.self, from: Data(seedless.utf8)))
    }

    func testAGrammarHoldsWhatFollowsAThought() async throws {
        let codec = try gemma4Codec()
        let grammar = try ByteGrammar(#"{"nodes": [["text", "in"], ["text", "the"], ["alt", 0, 1]], "start": 2}"#)
        let thought = try codec.tokenizer.encodeTemplate("<|channel>thought\nin the")
        let closes = try codec.tokenizer.encodeTemplate("<channel|>")
        for (thinking, expected) in [(true, "in the"), (false, "")] {
            var script = thought + closes
            let session = ScriptedSession { _ in script.isEmpty ? 5 : script.removeFirst() }
            let chat = try Conversation(session, codec, Sampler(try Sampling()), thinking: thinking)
            let reply = try chat.send("us", grammar: grammar)
            _ = try await pieces(reply)
            XCTAssertEqual(reply.reason, .constraint)
            XCTAssertTrue(["in", "the"].contains(reply.text), reply.text)
            XCTAssertEqual(reply.thought, expected)
        }
        let state = GrammarState(grammar, codec.tokenizer, stopTokens: [5], thinking: true)
        try state.accept(thought[0])
        XCTAssertTrue(try state.allows(closes[0]))
        XCTAssertFalse(try state.allows(5))
        XCTAssertFalse(state.isDone)
    }

    func testThinkingIsRefusedWhereTheTemplateHasNone() throws {
        let session = ScriptedSession { _ in 300 }
        XCTAssertThrowsError(try Conversation(session, tinyCodec(), Sampler(try Sampling()), thinking: true)) { error in
            XCTAssertTrue((error as? GemmaError)?.message.contains("can't ask for thoughts") == true, "\(error)")
        }
    }

    func testAConversationGoesOnAfterSavedTurns() async throws {
        let turns = [Message(.user, "one"), Message(.assistant, "in")]
        let session = try ScriptedSession.replying("out", tokenizer: tinyTokenizer())
        let codec = try tinyCodec()
        let chat = try Conversation(session, codec, Sampler(try Sampling()), system: "be brief", turns: turns)
        _ = try await pieces(chat.send("two"))
        XCTAssertEqual(chat.messages.map(\.content), ["be brief", "one", "in", "two", "out"])
        let whole = try encodeChat(codec.tokenizer, codec.format, chat.messages.dropLast())
        XCTAssertEqual(Array(session.tokens.prefix(whole.count)), whole)
        chat.reset()
        XCTAssertEqual(chat.messages.map(\.content), ["be brief"])
    }

    func testAnInvalidAnswerIsAskedForAgainWithItsViolations() async throws {
        let schema = try Schema(#"{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}"#)
        let chat = try conversation(
            ScriptedSession.replying("no idea", #"{"n": "x"}"#, #"Here: {"n": 3}"#, tokenizer: tinyTokenizer()))
        let answer = try await askStructured(chat, "count", schema)
        let valid = StructuredResult.valid(.object(JSONObject([("n", .number(3))])))
        XCTAssertEqual(answer, StructuredAnswer(result: valid, attempts: 3))
        XCTAssertEqual(answer.summary, "The answer matches the schema (3 tries): {\"n\": 3}")
        XCTAssertTrue(chat.messages[4].content.contains("expected integer"))
        let stubborn = try conversation(ScriptedSession.replying("no", "{}", #"{"n": 4}"#, tokenizer: tinyTokenizer()))
        var shown: [String] = []
        let invalid = try await askStructured(stubborn, "count", schema, attempts: 2) { reply, event in
            if event == .ended { shown.append(reply.text) }
        }
        XCTAssertEqual(shown, ["no", "{}"])
        let endless = try await askStructured(
            conversation(ScriptedSession { _ in 300 }), "count", schema, attempts: 1, maxNewTokens: 9
        ) { reply, event in
            if event == .ended { XCTAssertEqual(reply.reason, .length) }
        }
        XCTAssertTrue(endless.summary.contains("no complete JSON"))
        XCTAssertEqual(invalid.summary, "The answer does not match the schema (2 tries):\n- $: \"n\" is missing")
        XCTAssertEqual(stubborn.turns.count, 4)
        let last = try XCTUnwrap(lastQuestion(stubborn.turns), "the request, not the retry")
        XCTAssertEqual(request(in: stubborn.turns[last].content, schema), "count")
        XCTAssertEqual(request(in: stubborn.turns[last].content, nil), stubborn.turns[0].content)
        _ = try await askStructured(stubborn, "count", schema, at: last)
        XCTAssertEqual(stubborn.turns.map(\.content), [structuredPrompt("count", schema), #"{"n": 4}"#])
    }
}

final class TinyModelTests: XCTestCase {
    /// One test for all, since the bridge's pipes can be opened only once.
    func testGreedyTokensTheGoldensFiguresAndGoingBackEqualPythons() async throws {
        let bundle = try ModelBundle.open(tiny)
        let session = EngineSession(try BridgeEngine(vocabSize: bundle.manifest.vocabSize), bundle.manifest)
        try await checkGreedyTokens(session)
        let verification = try verify(session, loadGoldens(bundle), Limits())
        XCTAssertEqual(verification.verdict, .pass)
        try checkFigures(vectors().of("verify").of("lowering"), verification.lowering)
        try checkFigures(vectors().of("verify").of("quantization"), verification.quantization)
        let workload = Workload(promptLengths: [4, 8], decodePrompt: 4, newTokens: 3)
        let speed = try measureSpeed(session, vocabSize: bundle.manifest.vocabSize, workload, repeats: 2)
        try checkReport(bundle, verification, speed)
        try checkRewinds(session)
        try await checkAnswersInEarlierPlaces(session, ChatCodec(bundle))
    }

    /// It goes back exactly, or to 0 where its caches were shortened since.
    private func checkRewinds(_ session: Session) throws {
        let tokens = (0..<90).map { 3 + $0 * 7 % 300 }
        let answers = try [1, 8, 9, 62, 63, 72, 75].map { position in
            session.reset()
            _ = try session.prefill(Array(tokens[..<position]))
            let expected = try session.decode(3)
            _ = try session.prefill([Int](repeating: 5, count: 9))
            let answer = try session.rewind(to: position)
            XCTAssertEqual(answer, session.position)
            if answer == 0 { _ = try session.prefill(Array(tokens[..<position])) }
            XCTAssertEqual(expected, try session.decode(3))
            return answer
        }
        XCTAssertEqual(answers, [1, 8, 9, 62, 0, 0, 75])
        XCTAssertThrowsError(try session.rewind(to: 77))
    }
}
