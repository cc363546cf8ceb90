import Foundation
import XCTest

@testable import GemmaKit

private let end = 5  // the token that ends a turn, in both tokenizers
private let called = #"{"name": "get_weather", "parameters": {"city": "inn"}}"#
private let marked = #"<|tool_call>call:get_weather{city:<|"|>inn<|"|>}<tool_call|>"#

final class ToolConversationTests: XCTestCase {
    private let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
    private let sunny = JSON.object(JSONObject([("sky", .string("clear"))]))
    private let weather = ToolCall(name: "get_weather", arguments: JSONObject([("city", .string("inn"))]))

    override func tearDown() { try? FileManager.default.removeItem(at: folder) }

    private func tools() throws -> Tools { try Tools(exampleTools) }

    private func json() throws -> ChatCodec {
        ChatCodec(tokenizer: try tinyTokenizer(), format: try XCTUnwrap(toolFormats()["gemma3"]), stopTokens: [1, end])
    }

    private func codec(_ codec: ChatCodec, tools: ToolFormat?) -> ChatCodec {
        ChatCodec(tokenizer: codec.tokenizer, format: codec.format.with(tools: tools), stopTokens: codec.stopTokens)
    }

    /// A session that generates these replies, in which names of control tokens are tokens.
    private func replying(_ codec: ChatCodec, _ replies: String..., contextLength: Int = 8192) throws -> ScriptedSession {
        try replying(codec, replies, contextLength: contextLength)
    }

    private func replying(_ codec: ChatCodec, _ replies: [String], contextLength: Int = 8192) throws -> ScriptedSession {
        var remaining = try replies.map { try codec.tokenizer.encodeTemplate($0) + [end] }
        return ScriptedSession(contextLength: contextLength) { _ in
            let token = remaining[0].removeFirst()
            if remaining[0].isEmpty || codec.ends.contains(token) { remaining.removeFirst() }
            return token
        }
    }

    private func conversation(
        _ session: Session, _ codec: ChatCodec, thinking: Bool = false, roll: Bool = false
    ) throws -> Conversation {
        try Conversation(
            session, codec, Sampler(try Sampling()), system: "be brief", roll: roll, thinking: thinking, tools: try tools())
    }

    @discardableResult
    private func read(_ reply: Reply) async throws -> Reply {
        try await reply.run()
        return reply
    }

    /// What was fed for the last reply is a new conversation with the same turns.
    private func checkFed(_ chat: Conversation, _ session: ScriptedSession, _ format: ChatFormat, _ codec: ChatCodec) throws {
        let whole = try encodeChat(codec.tokenizer, format, chat.messages.dropLast(), tools: try tools())
        XCTAssertEqual(Array(session.tokens.prefix(whole.count)), whole)
    }

    private func checkThrows(_ text: String, _ work: () throws -> Void) {
        XCTAssertThrowsError(try work()) { error in
            XCTAssertTrue((error as? GemmaError)?.message.contains(text) == true, "\(error)")
        }
    }

    func testAReplyHasItsCallsAndTheModelAnswersTheirResults() async throws {
        for (codec, call) in [
            (try json(), "the\n```json\n\(called)\n```"), (try gemma4Codec(), "the \(marked)<|tool_response>never said"),
        ] {
            let session = try replying(codec, call, "it is clear", "so")
            let chat = try conversation(session, codec)
            let reply = try await read(chat.send("the user?"))
            XCTAssertEqual(reply.text, "the")
            XCTAssertEqual(reply.toolCalls, [weather])
            XCTAssertEqual(weather.summary, "get_weather(city: \"inn\")")
            XCTAssertEqual(reply.reason, .stopToken)
            XCTAssertEqual(openCalls(chat.turns), [weather])
            let answer = try await read(chat.send(results: [sunny]))
            XCTAssertEqual(answer.text, "it is clear")
            XCTAssertEqual(answer.toolCalls, [])
            XCTAssertEqual(answer.results.map(shownResult), [#"get_weather returned: {"sky": "clear"}"#])
            XCTAssertEqual(chat.turns.map(\.role), [.user, .assistant, .tool, .assistant])
            try checkFed(chat, session, codec.format, codec)
            try await read(chat.send("in?"))
            try checkFed(chat, session, codec.format, codec)
            XCTAssertEqual(lastQuestion(chat.turns), 4)
        }
    }

    func testResultsMustBeAsManyAsCallsAndRefusedOnesChangeNothing() async throws {
        let codec = try json()
        let chat = try conversation(try replying(codec, called, "so"), codec)
        checkThrows("calls 0 tools, but there are 1 results") { _ = try chat.send(results: [sunny]) }
        try await read(chat.send("one"))
        checkThrows("calls 1 tools, but there are 0") { _ = try chat.send(results: []) }
        let before = chat.turns
        _ = try chat.send(results: [sunny])  // never iterated
        XCTAssertEqual(chat.turns, before)
        try await read(chat.send(results: [.string("clear")]))
        XCTAssertEqual(chat.turns[2].content, "clear")
    }

    func testAStoppedReplyCallsNothing() async throws {
        let codec = try json()
        let chat = try conversation(try replying(codec, called), codec)
        let reply = try chat.send("one")
        for _ in 0..<20 { _ = try await reply.next() }
        XCTAssertEqual(reply.toolCalls, [])
        XCTAssertEqual(chat.turns.map(\.content), ["one", reply.text])
    }

    func testAThoughtBeforeCallsIsKeptUntilTheUsersNextTurnAndAfterResultsOneBegins() async throws {
        let codec = try gemma4Codec()
        let session = try replying(
            codec, "<|channel>thought\nin the inn<channel|>\(marked)<|tool_response>", "the<channel|>it is", "so")
        let chat = try conversation(session, codec, thinking: true)
        let format = try XCTUnwrap(codec.format.thinking)
        let first = try await read(chat.send("one"))
        XCTAssertEqual(first.thought, "in the inn")
        XCTAssertEqual(chat.turns[1].thought, "in the inn")
        let answer = try await read(chat.send(results: [sunny]))
        XCTAssertEqual([answer.thought, answer.text], ["the", "it is"])
        try checkFed(chat, session, format, codec)
        XCTAssertTrue(codec.tokenizer.decode(session.tokens).contains("in the inn\n"))
        XCTAssertEqual(chat.turns.last?.thought, "")
        try await read(chat.send("two"))
        try checkFed(chat, session, format, codec)
        XCTAssertFalse(codec.tokenizer.decode(session.tokens).contains("in the inn\n"))
    }

    func testARollingChatForgetsAQuestionWithItsCallsAndResults() async throws {
        for (codec, call) in [(try json(), called), (try gemma4Codec(), "\(marked)<|tool_response>")] {
            let turns = [Message(.system, "be brief"), Message(.user, "question 1")]
            let length = try encodeChat(codec.tokenizer, codec.format, turns, tools: try tools()).count
            let replies = (0..<8).flatMap { _ in [call, "the inn"] }
            let session = try replying(codec, replies, contextLength: (length + 300) * 4 / 3)
            let chat = try conversation(session, codec, roll: true)
            for index in 0..<8 {
                try await read(chat.send("question \(index)"))
                try await read(chat.send(results: [sunny]))
            }
            XCTAssertEqual(chat.turns.count, 32)
            XCTAssertTrue((4...28).contains(chat.forgotten) && chat.forgotten % 4 == 0, "\(chat.forgotten)")
            XCTAssertEqual(chat.messages[1].role, .user)
            try checkFed(chat, session, codec.format, codec)
        }
    }

    func testAQuestionBeforeCallsCanBeEditedAndTheLastQuestionAskedAgainAfterResults() async throws {
        let codec = try json()
        let session = try replying(codec, called, "so", called, "in", "the")
        let chat = try conversation(session, codec)
        try await read(chat.send("one"))
        try await read(chat.send(results: [sunny]))
        for index in 1...3 { XCTAssertThrowsError(try chat.send("x", at: index)) }
        XCTAssertEqual(lastQuestion(chat.turns), 0)
        try await read(chat.send("one", at: 0))
        XCTAssertEqual(chat.turns.count, 2)
        try await read(chat.send(results: [sunny]))
        try await read(chat.send("two", at: 0))
        XCTAssertEqual(chat.turns.map(\.content), ["two", "the"])
        try checkFed(chat, session, codec.format, codec)
    }

    func testSavedChatsKeepCallsAndResultsAndThoseOfEarlierVersionsAreRead() throws {
        let store = ChatStore(folder)
        guard case .object(let arguments) = try parseJSON(#"{"n": [1, 2.0, 12345678901234567890, 1e-7, "é😀\n"]}"#) else {
            return XCTFail("it is no object")
        }
        let calls = [ToolCall(name: "f", arguments: arguments), ToolCall(name: "g", arguments: JSONObject([]))]
        let call = Message(.assistant, "so", toolCalls: calls, thought: "thinking")
        let results = zip(calls, [.object(arguments), .string("clear")]).map(resultTurn)
        var settings = ChatSettings()
        settings.tools = exampleTools
        let changed = Date(timeIntervalSince1970: 1)
        let chat = SavedChat(settings: settings, turns: [Message(.user, "one"), call] + results, changed: changed)
        try store.save(chat)
        let read = try XCTUnwrap(store.load().first)
        XCTAssertEqual(read, chat)
        for codec in [try json(), try gemma4Codec()] {  // a double would lose digits
            let ids = try [chat, read].map { try encodeChat(codec.tokenizer, codec.format, $0.turns, tools: try tools()) }
            XCTAssertEqual(ids[0], ids[1])
        }
        XCTAssertEqual(read.turns[2].content, #"{"n": [1, 2.0, 12345678901234567890, 1e-07, "é😀\n"]}"#)
        let file = folder.appendingPathComponent("chats/\(chat.id.uuidString).json")
        let text = try String(contentsOf: file, encoding: .utf8)
        for (whole, damaged) in [(#"\"n\""#, "n"), (#""arguments":"#, #""other":"#), (#""result":"#, #""other":"#)] {
            XCTAssertTrue(text.contains(whole), "\(whole) in \(text)")
            try text.replacingOccurrences(of: whole, with: damaged).write(to: file, atomically: true, encoding: .utf8)
            XCTAssertEqual(store.load(), [], whole)
        }
        let old = #"{"id": "\#(chat.id.uuidString)", "changed": 5, "turns": [{"role": "user", "content": "one"}]}"#
        try old.write(to: file, atomically: true, encoding: .utf8)
        XCTAssertEqual(store.load().first?.turns, [Message(.user, "one")])
    }

    func testToolsThatAreNoneAreRefusedByPlace() throws {
        XCTAssertTrue(try Tools(" \n").isEmpty)
        XCTAssertEqual(try tools().names, ["get_weather", "current_time"])
        XCTAssertEqual(try Tools(#"[{"name": "f"}]"#), try Tools(#"[{"type": "function", "function": {"name": "f"}}]"#))
        let refused = [
            ("[", "the tools are not JSON"), ("{}", "the tools are {}, expected a list"), ("[1]", "tool 1 has no name"),
            (#"[{"name": "f"}, {"name": 1}]"#, "tool 2 has no name"), (#"[{"function": 1}]"#, "tool 1 has no name"),
            (String(repeating: "[", count: 200), "nesting deeper than 128 levels"),
        ]
        for (text, message) in refused { checkThrows(message) { _ = try Tools(text) } }
    }

    func testAModelThatCannotBeGivenToolsRefusesThemAndChatsThatHaveCalls() throws {
        let without = codec(try json(), tools: nil)
        XCTAssertTrue(try json().canCall && !without.canCall)
        checkThrows("tap No tools in Tools") { _ = try conversation(try replying(without), without) }
        let file = try String(contentsOf: tiny.appendingPathComponent("chat.json"), encoding: .utf8)
        let earlier = try ChatFormat(Data(file.replacingOccurrences(of: "\"tools\"", with: "\"later\"").utf8))
        XCTAssertNil(earlier.tools, "bundles of an earlier version")
        let call = Message(.assistant, "", toolCalls: [ToolCall(name: "f", arguments: JSONObject([]))])
        let chat = try Conversation(
            try replying(without), without, Sampler(try Sampling()), turns: [Message(.user, "a"), call])
        checkThrows("tap No tools in Tools") { _ = try chat.send("b") }
    }

    func testASchemaThatGemma4sTemplateWouldGarbleIsRefusedByName() throws {
        let (marked, plain) = (try gemma4Codec(), try json())
        func property(_ text: String) -> String {
            #"[{"name": "f", "parameters": {"type": "object", "properties": {"a": \#(text)}}}]"#
        }
        let refused = [
            (property(#"{"type": ["string", "null"]}"#), "\"type\""),
            (property(#"{"type": "string", "description": 7}"#), "\"description\""),
            (property(#"{"type": "object", "required": "a"}"#), "\"required\""),
            (#"[{"name": "f", "description": null}]"#, "\"description\""),
            (#"[{"name": "f", "parameters": []}, {"name": "g", "parameters": 1}]"#, "the tool g has \"parameters\": 1"),
        ]
        for (text, message) in refused {
            checkThrows(message) { try marked.check(try Tools(text)) }
            try plain.check(try Tools(text))  // there it is JSON
        }
    }

    func testCallsThatTheAppAnswersAreAnsweredFiveTimesInARowAndOthersLeftOpen() async throws {
        let call = #"{"name": "current_time", "parameters": {}}"#
        let codec = try json()
        func answer(_ replies: [String]) async throws -> (Conversation, Int) {
            let chat = try conversation(try replying(codec, replies), codec)
            try await read(chat.send("when?"))
            var answered = 0
            try await answerBuiltIn(
                chat, result: { $0.name == "current_time" ? .string("noon") : nil },
                onEvent: { _, event in answered += event == .ended ? 1 : 0 })
            return (chat, answered)
        }
        let (chat, answered) = try await answer([call, call, "it is"])
        XCTAssertEqual(answered, 2)
        XCTAssertEqual(chat.turns.map(\.content), ["when?", "", "noon", "", "noon", "it is"])
        let rounds = try await answer(Array(repeating: call, count: 7)).1
        XCTAssertEqual(rounds, 5)
        let (open, none) = try await answer(["[\(call), \(called)]"])
        XCTAssertEqual([none, openCalls(open.turns).count], [0, 2])
        let text = try await answer(["in"]).1
        XCTAssertEqual(text, 0)
    }

    /// A model may call what it was not given, and the app answered it.
    func testOnlyAChatWithToolsHasCallsAndTheAppAnswersOnlyThoseOfItsTools() async throws {
        let codec = try gemma4Codec()
        let call = "the <|tool_call>call:current_time{}<tool_call|><|tool_response>"
        func calls(_ tools: String) async throws -> (asked: Int, turns: Int) {
            let session = try replying(codec, call, "it is")
            let chat = try Conversation(session, codec, Sampler(try Sampling()), tools: try Tools(tools))
            let reply = try await read(chat.send("when?"))
            try await answerBuiltIn(chat)
            return (reply.toolCalls.count, chat.turns.count)
        }
        let none = try await calls("[]")
        XCTAssertEqual([none.asked, none.turns], [0, 2])
        let other = try await calls(#"[{"name": "f"}]"#)
        XCTAssertEqual([other.asked, other.turns], [1, 2])
        let given = try await calls(exampleTools)
        XCTAssertEqual([given.asked, given.turns], [1, 4])
    }

    func testTheAppAnswersOneToolItselfAndShowsCallsBelowTheText() throws {
        let call = ToolCall(name: "current_time", arguments: JSONObject([]))
        let zone = try XCTUnwrap(TimeZone(identifier: "Asia/Kolkata"))
        let time = builtInResult(call, now: Date(timeIntervalSince1970: 1_796_000_000), zone: zone)
        XCTAssertEqual(
            time?.pythonJSON(), #"{"time": "2026-11-30T06:23:20+05:30", "weekday": "Monday", "zone": "Asia/Kolkata"}"#)
        XCTAssertNil(builtInResult(weather))
        XCTAssertEqual(parseResult("it is"), .string("it is"))
        XCTAssertEqual(parseResult(" {\"sky\": \"clear\"} "), sunny)
        XCTAssertEqual(shownReply("the", [call]), "the\n\nCalls a tool:\n\n```\ncurrent_time()\n```")
        XCTAssertEqual(shownReply("", [call, call]), "Calls 2 tools:\n\n```\ncurrent_time()\ncurrent_time()\n```")
        XCTAssertEqual(shownReply("the", []), "the")
    }

    func testAChatHasToolsOrAFormat() throws {
        var settings = ChatSettings()
        settings.tools = exampleTools
        XCTAssertNil(settings.conflict)
        settings.format = try AnswerFormat(schema: "{}", grammar: nil)
        XCTAssertTrue(settings.conflict?.contains("tap Any answer in Schema") == true)
        for none in [" ", "[]", "\n[ ]"] {
            settings.tools = none
            XCTAssertNil(settings.conflict)
            XCTAssertFalse(settings.hasTools)
        }
    }
}
