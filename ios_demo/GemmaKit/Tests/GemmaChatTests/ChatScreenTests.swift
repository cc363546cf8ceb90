import Foundation
import XCTest

@testable import GemmaChat
@testable import GemmaKit

/// Generates one token over and over, slowly, and records whether two calls overlapped.
private final class SlowEngine: Engine, @unchecked Sendable {
    let runtime = "a script 1.0"
    let givesEveryRow = true
    let pause: TimeInterval
    private(set) var computeUnits: ComputeUnits?
    private let lock = NSLock()
    private var inside = 0
    private(set) var overlapped = false
    private(set) var calls = 0
    private(set) var opened = 0
    private(set) var strayed = false  // ran elsewhere than on the model's own thread

    /// Counts how often it is opened, and remembers where it was to run.
    func opening(_ units: ComputeUnits) -> SlowEngine {
        lock.withLock {
            opened += 1
            computeUnits = units
        }
        return self
    }

    init(pause: TimeInterval) {
        self.pause = pause
    }

    func run(_ tokens: [Int], position: Int, rows: Int) throws -> [[Float]] {
        lock.withLock {
            inside += 1
            calls += 1
            overlapped = overlapped || inside > 1
            strayed = strayed || DispatchQueue.getSpecific(key: isModelThread) != true
        }
        Thread.sleep(forTimeInterval: pause)
        lock.withLock { inside -= 1 }
        var row = [Float](repeating: 0, count: 376)
        row[300] = 100
        return [[Float]](repeating: row, count: rows)
    }
}

private let isModelThread = DispatchSpecificKey<Bool>()

@MainActor
final class ChatScreenTests: XCTestCase {
    private let tiny = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
        .appendingPathComponent("../../../../tests/data/tiny").standardizedFileURL

    private let root = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
    private var free = 1e9  // bytes that the app may use

    override func tearDown() async throws {
        try? FileManager.default.removeItem(at: root)
    }

    /// A screen over the same folders as the test's other screens, as after the app's next start.
    private func screen(_ engine: SlowEngine) -> ChatScreen {
        let library = BundleLibrary(
            folder: root.appendingPathComponent("Documents"), support: root.appendingPathComponent("Support"),
            compiled: root.appendingPathComponent("compiled"))
        return ChatScreen(
            library: library, store: ChatStore(root.appendingPathComponent("Support")),
            open: { _, _, units in engine.opening(units) }, freeBytes: { self.free })
    }

    private func loaded(pause: TimeInterval = 0.002) async throws -> (ChatScreen, SlowEngine) {
        let engine = SlowEngine(pause: pause)
        let screen = screen(engine)
        screen.resume()
        try await waitUntilIdle(screen)
        screen.add(from: tiny)
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.status.hasPrefix("tiny · loaded in "), screen.status)
        return (screen, engine)
    }

    private func waitUntilIdle(_ screen: ChatScreen) async throws {
        try await waitUntil { !screen.busy }
    }

    private func waitUntil(_ reached: () -> Bool) async throws {
        for _ in 0..<10_000 where !reached() { try await Task.sleep(for: .milliseconds(1)) }
        XCTAssertTrue(reached())
    }

    func testADownloadAppearsWholeAndOneThatFailsCanGoOn() async throws {
        guard let port = ProcessInfo.processInfo.environment["GEMMA_DOWNLOADS"] else {
            throw XCTSkip("there is no Python to serve downloads")
        }
        let screen = screen(SlowEngine(pause: 0))
        screen.makeDownload = {
            HubDownload(
                $0, isMeteredAllowed: $1, origin: "http://127.0.0.1:\(port)", plainHosts: ["127.0.0.1"], timeout: 5,
                pause: 0.001)
        }
        screen.resume()
        try await waitUntilIdle(screen)
        screen.download("hub:one/altered", isMeteredAllowed: false)
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.warning?.contains("arrived altered") == true, "\(screen.warning ?? "")")
        XCTAssertEqual(screen.downloads.map(\.address), ["hub:one/altered"])
        XCTAssertEqual(screen.bundles, [])
        screen.discard(screen.downloads[0])
        try await waitUntilIdle(screen)
        screen.download("one/whole", isMeteredAllowed: false)
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.bundles.map(\.lastPathComponent), ["whole"])
        XCTAssertTrue(screen.status.hasPrefix("tiny · loaded in "), screen.status)
        XCTAssertEqual(screen.downloads, [])
        screen.download("no address", isMeteredAllowed: false)
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.warning?.contains("hub:OWNER/NAME") == true, "\(screen.warning ?? "")")
    }

    /// An engine may wait there for a runtime that is asynchronous, as Core AI's is; in Swift's pool it must not.
    func testTheModelRunsOnAThreadOfItsOwn() async throws {
        let engine = SlowEngine(pause: 0)
        let screen = screen(engine)
        screen.model.thread.queue.setSpecific(key: isModelThread, value: true)
        screen.choose(tiny)
        try await waitUntilIdle(screen)
        screen.send("in")
        try await waitUntilIdle(screen)
        screen.benchmark()
        try await waitUntilIdle(screen)
        XCTAssertGreaterThan(engine.calls, 100)
        XCTAssertFalse(engine.strayed)
    }

    /// The text of the file to share.
    private func shared(_ screen: ChatScreen) throws -> String {
        String(decoding: try Data(contentsOf: XCTUnwrap(screen.report)), as: UTF8.self)
    }

    func testComputeUnitsApplyFromTheNextLoadingOnAndTheReportHasThoseInUse() async throws {
        let (screen, engine) = try await loaded(pause: 0)
        try await screen.use(screen.settings, .cpuOnly)
        try await waitUntilIdle(screen)
        let reported = { () async throws -> JSON in
            screen.sustain(minutes: 0.0001)
            try await self.waitUntilIdle(screen)
            let report = try parseJSON(self.shared(screen))
            guard case .object(let fields) = report, case .object(let device) = fields["device"] else { return .null }
            return device["compute_units"] ?? .null
        }
        let before = try await reported()
        XCTAssertEqual(before, .string("automatic"), "the model was loaded before the choice")
        screen.choose(try XCTUnwrap(screen.bundle))
        try await waitUntilIdle(screen)
        XCTAssertEqual(engine.computeUnits, .cpuOnly)
        let after = try await reported()
        XCTAssertEqual(after, .string("cpu_only"))
        let next = self.screen(SlowEngine(pause: 0))
        next.resume()
        try await waitUntilIdle(next)
        XCTAssertEqual(next.computeUnits, .cpuOnly, "it is kept")
    }

    func testASustainedBenchmarkIsDrawnAndReported() async throws {
        let (screen, _) = try await loaded(pause: 0.001)
        screen.sustain(minutes: 0.01)
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.spans.count, 1)
        XCTAssertTrue(screen.result?.hasPrefix("first ") == true, "\(screen.result ?? "")")
        let report = try parseJSON(shared(screen))
        guard case .object(let fields) = report, case .object(let sustained) = fields["sustained"] else {
            return XCTFail("\(report)")
        }
        XCTAssertEqual(sustained["sustained_minutes"], .number(0.01))
        XCTAssertEqual(fields["bench"], .null)
        screen.sustain()
        try await waitUntil { screen.busy }
        screen.stop()
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.status, "Stopped.")
    }

    func testAReplyStreamsUntilTheContextIsFull() async throws {
        let (screen, _) = try await loaded(pause: 0)
        screen.send("the user")
        XCTAssertTrue(screen.busy)
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.turns.map(\.isUser), [true, false])
        XCTAssertGreaterThan(screen.turns[1].text.count, 60)
        XCTAssertEqual(screen.warning, "The context is full. Tap New chat to go on.")
        XCTAssertTrue(screen.status.contains(" tokens/s · first after "), screen.status)
        XCTAssertEqual(screen.answersEnded, 1)
        screen.send("more")
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.answersEnded, 1, "no answer began, so none is announced")
        XCTAssertTrue(screen.warning?.contains("start a new chat") == true, "\(screen.warning ?? "")")
    }

    /// The last piece of a stopped reply once reached an emptied chat and crashed the app.
    func testANewChatDuringAReplyWaitsUntilTheModelIsFree() async throws {
        let (screen, engine) = try await loaded()
        for _ in 0..<12 {
            screen.send("the user")
            let before = engine.calls
            try await waitUntil { engine.calls > before + 2 }
            screen.reset()
            XCTAssertTrue(screen.turns.isEmpty)
            screen.send("too early")  // the model is not free yet
            try await waitUntilIdle(screen)
            XCTAssertFalse(screen.turns.contains { $0.isUser })
        }
        XCTAssertFalse(engine.overlapped)
        screen.send("in")
        try await waitUntil { screen.turns.count == 2 && !screen.turns[1].text.isEmpty }
        screen.stop()
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.status, "Stopped.")
    }

    func testLowMemoryUnloadsTheIdleModelKeepsTheChatAndTheNextMessageLoadsItAgain() async throws {
        let (screen, engine) = try await loaded()
        screen.send("the user")
        try await waitUntil { engine.calls > 4 }
        screen.memoryWarning()  // there is enough memory, and a reply is running
        XCTAssertTrue(screen.busy)
        screen.stop()
        try await waitUntilIdle(screen)
        XCTAssertNotNil(screen.contextUse)
        free = 1e6
        screen.memoryWarning()
        try await waitUntilIdle(screen)
        XCTAssertNil(screen.contextUse)
        XCTAssertTrue(screen.status.contains("was unloaded, because memory is low"), screen.status)
        XCTAssertEqual(screen.turns.map(\.isUser), [true, false])
        let opened = engine.opened
        screen.send("in")
        try await waitUntil { screen.turns.count == 4 && !screen.turns[3].text.isEmpty }
        XCTAssertEqual(engine.opened, opened + 1)
        screen.memoryWarning()  // waits until the reply has ended
        screen.stop()
        try await waitUntil { !screen.busy && screen.contextUse == nil }
        XCTAssertEqual(screen.turns.count, 4)
    }

    func testTheNextStartGoesOnWithTheSameBundleChatAndSettings() async throws {
        let (first, engine) = try await loaded()
        var settings = ChatSettings()
        settings.system = "be brief"
        settings.sampling = try Sampling(temperature: 0.5)
        try await first.use(settings, .automatic)
        try await waitUntilIdle(first)
        first.send("in")
        try await waitUntil { first.turns.count == 2 && !first.turns[1].text.isEmpty }
        first.stop()
        try await waitUntilIdle(first)
        let second = screen(engine)
        second.resume()
        try await waitUntilIdle(second)
        XCTAssertNil(second.warning)
        XCTAssertEqual(second.bundle?.lastPathComponent, "tiny")
        XCTAssertEqual(second.settings, settings)
        XCTAssertEqual(second.turns.map(\.isUser), [true, false])
        XCTAssertEqual(second.turns[0].text, "in")
        XCTAssertEqual(second.chats.map(\.title), ["in"])
        second.send("more")
        try await waitUntil { second.turns.count == 4 && !second.turns[3].text.isEmpty }
        second.stop()
        try await waitUntilIdle(second)
        XCTAssertEqual(second.chats[0].turns.map(\.content).first, "in")
        XCTAssertEqual(second.chats[0].turns.count, 4)
    }

    func testChatsAreKeptApartOpenedAgainAndDeleted() async throws {
        let (screen, _) = try await loaded(pause: 0)
        for question in ["one", "two"] {
            screen.send(question)
            try await waitUntilIdle(screen)
            screen.reset()
            try await waitUntilIdle(screen)
        }
        XCTAssertEqual(screen.turns.count, 0)
        XCTAssertEqual(screen.chats.map(\.title), ["two", "one"])
        screen.open(screen.chats[1])
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.turns[0].text, "one")
        screen.delete(screen.chats[1])
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.chats.map(\.title), ["two"])
        XCTAssertEqual(screen.turns.count, 0)
    }

    func testAQuestionIsEditedAnsweredAgainAndAnUnansweredOneChangesNothing() async throws {
        let (screen, engine) = try await loaded()
        func stopAfterAWord(_ screen: ChatScreen, _ turns: Int, _ act: () -> Void) async throws {
            let calls = engine.calls
            act()
            try await waitUntil { engine.calls > calls && screen.turns.last?.isUser == false && screen.turns.last?.text != "" }
            screen.stop()
            try await waitUntilIdle(screen)
            XCTAssertEqual(screen.turns.count, turns)
        }
        try await stopAfterAWord(screen, 2) { screen.send("one") }
        try await stopAfterAWord(screen, 4) { screen.send("two") }
        XCTAssertEqual(screen.turns.map(screen.isLastAnswer), [false, false, false, true])
        try await stopAfterAWord(screen, 4) { screen.answerAgain() }
        XCTAssertNil(screen.unanswered)
        XCTAssertEqual(screen.turns.filter(\.isUser).map(\.text), ["one", "two"])
        screen.edit(screen.turns[0], String(repeating: "three ", count: 200))
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.warning?.contains("start a new chat") == true, screen.warning ?? "none")
        XCTAssertTrue(screen.unanswered?.hasPrefix("three ") == true)
        XCTAssertEqual(screen.turns.filter(\.isUser).map(\.text), ["one", "two"])
        XCTAssertEqual(screen.chats[0].turns.count, 4)
        try await stopAfterAWord(screen, 2) { screen.edit(screen.turns[0], "three") }
        XCTAssertNil(screen.unanswered)
        XCTAssertEqual(screen.turns.map(\.place), [0, nil])
        XCTAssertEqual(screen.chats[0].turns.map(\.content), ["three", screen.turns[1].text])
        XCTAssertEqual(screen.chats.count, 1)
        let next = self.screen(engine)
        next.resume()
        try await waitUntilIdle(next)
        XCTAssertEqual(next.turns.map(\.text), screen.turns.map(\.text))
        try await stopAfterAWord(next, 2) { next.edit(next.turns[0], "four") }
        XCTAssertEqual(next.chats[0].turns.map(\.content), ["four", next.turns[1].text])
    }

    func testWhatComesAfterAStopIsShown() async throws {
        let (screen, _) = try await loaded(pause: 0)
        let shown = Shown()
        let task = Task {
            try await screen.follow({ (send: @escaping @Sendable (Int) -> Void) in
                send(1)
                while !Task.isCancelled { try? await Task.sleep(nanoseconds: 1_000_000) }
                send(2)
            }) { shown.events.append($0) }
        }
        try await waitUntil { shown.events == [1] }
        task.cancel()
        try await task.value
        XCTAssertEqual(shown.events, [1, 2])
    }

    func testThinkingWithATemplateThatHasNoneIsRefusedAndChangesNothing() async throws {
        let (screen, _) = try await loaded(pause: 0)
        var settings = ChatSettings()
        settings.thinking = true
        do {
            try await screen.use(settings, .cpuOnly)
            XCTFail("it was accepted")
        } catch { XCTAssertTrue((error as? GemmaError)?.message.contains("can't ask for thoughts") == true, "\(error)") }
        try await waitUntilIdle(screen)
        XCTAssertNil(screen.warning, "it is for the sheet to say")
        XCTAssertEqual(screen.settings, ChatSettings())
        XCTAssertEqual(screen.computeUnits, .automatic)
        screen.send("in")
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.turns.count, 2)
    }

    func testBundlesAreImportedSideBySideAndTheLoadedOneIsDeleted() async throws {
        let (screen, _) = try await loaded(pause: 0)
        var ended = 0
        screen.add(from: tiny) { ended += 1 }
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.bundles.map(\.lastPathComponent), ["tiny", "tiny 2"])
        XCTAssertEqual(screen.bundle?.lastPathComponent, "tiny 2")
        screen.delete(screen.bundles[1])
        try await waitUntilIdle(screen)
        XCTAssertNil(screen.bundle)
        XCTAssertEqual(screen.bundles.map(\.lastPathComponent), ["tiny"])
        screen.send("anyone?")
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.warning?.contains("tap Bundles") == true, screen.warning ?? "")
        screen.add(from: root.appendingPathComponent("nowhere")) { ended += 1 }
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.warning?.contains("is missing") == true, screen.warning ?? "")
        XCTAssertEqual(ended, 2)
    }

    func testAnAnswerIsCheckedAgainstTheSchema() async throws {
        let (screen, _) = try await loaded(pause: 0)
        screen.use(try AnswerFormat(schema: #"{"type": "object"}"#, grammar: nil))
        try await waitUntilIdle(screen)
        screen.send("x")
        try await waitUntilIdle(screen)
        // The context has no room for a second attempt, which gives a warning.
        XCTAssertTrue(screen.warning?.contains("start a new chat") == true, "\(screen.warning ?? "")")
        screen.use(AnswerFormat())
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.settings.format.isAny)
    }

    func testAnAnswerIsHeldToACompiledSchemaWhichIsSavedWithTheChat() async throws {
        let (screen, engine) = try await loaded(pause: 0)
        let grammar = try GrammarFile(name: "a.json", text: #"{"nodes": [["text", "in the inn"]], "start": 0}"#)
        screen.use(AnswerFormat(grammar: grammar))
        try await waitUntilIdle(screen)
        screen.send("x")
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.turns.map(\.text), ["x", "in the inn"])
        XCTAssertEqual(screen.status, "The format is guaranteed by a.json.")
        let endless = try GrammarFile(name: "b.json", text: #"{"nodes": [["text", "i"], ["repeat", 0, 9999, null]], "start": 1}"#)
        screen.use(AnswerFormat(grammar: endless))
        try await waitUntilIdle(screen)
        screen.answerAgain()
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.status, "The answer was cut, so it doesn't have the format of b.json.")
        let next = self.screen(engine)
        next.resume()
        try await waitUntilIdle(next)
        XCTAssertEqual(next.settings.format.grammar, endless)
        XCTAssertEqual(next.chats[0].settings?.format.grammar, endless)
    }

    /// They were the app's, so a chat that was opened again went on with those of another.
    func testSettingsAreTheChatsOwn() async throws {
        let (screen, engine) = try await loaded(pause: 0)
        func set(_ system: String) async throws {
            var settings = screen.settings
            settings.system = system
            try await screen.use(settings, .automatic)
            try await waitUntilIdle(screen)
        }
        try await set("be brief")
        screen.send("one")
        try await waitUntilIdle(screen)
        screen.reset()
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.settings.system, "be brief", "a new chat begins with them")
        try await set("be long")
        screen.send("two")
        try await waitUntilIdle(screen)
        screen.open(screen.chats[1])
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.settings.system, "be brief")
        try await set("be kind")
        XCTAssertEqual(screen.chats.map(\.title), ["two", "one"], "settings don't move a chat")
        screen.open(screen.chats[0])
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.settings.system, "be long")
        let next = self.screen(engine)
        next.resume()
        try await waitUntilIdle(next)
        XCTAssertEqual(next.settings.system, "be long")
        next.open(next.chats[1])
        try await waitUntilIdle(next)
        XCTAssertEqual(next.settings.system, "be kind")
    }

    func testAChatOfAnEarlierVersionTakesTheSettingsOfAllChats() async throws {
        let (screen, _) = try await loaded(pause: 0)
        var state = AppState()
        state.settings.system = "be brief"
        let old = SavedChat(turns: [Message(.user, "in"), Message(.assistant, "in")])
        state.chat = old.id
        try screen.store.save(old)
        try screen.store.save(state)
        let next = self.screen(SlowEngine(pause: 0))
        next.resume()
        try await waitUntilIdle(next)
        XCTAssertEqual(next.settings, state.settings)
        XCTAssertEqual(next.turns.count, 2)
    }

    /// The chat stayed closed, so nothing could be changed.
    func testAChatWhoseSettingsTheBundleLacksIsOpenedAndSaysSoWhenAsked() async throws {
        let (screen, _) = try await loaded(pause: 0)
        var settings = ChatSettings()
        settings.thinking = true
        let chat = SavedChat(settings: settings, turns: [Message(.user, "in"), Message(.assistant, "in")])
        screen.open(chat)
        try await waitUntilIdle(screen)
        XCTAssertNil(screen.warning)
        XCTAssertEqual(screen.turns.count, 2)
        screen.send("more")
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.warning?.contains("turn thinking off in Settings") == true, screen.warning ?? "")
        try await screen.use(ChatSettings(), .automatic)
        try await waitUntilIdle(screen)
        screen.send("more")
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.turns.count, 4)
    }

    func testAChatsCallsAreShownAndWaitForResults() async throws {
        let (screen, _) = try await loaded(pause: 0)
        let call = ToolCall(name: "f", arguments: JSONObject([("a", .string("in"))]))
        var chat = SavedChat(turns: [Message(.user, "in"), Message(.assistant, "the", toolCalls: [call])])
        screen.open(chat)
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.turns.map(\.text), ["in", "the\n\nCalls a tool:\n\n```\nf(a: \"in\")\n```"])
        XCTAssertEqual(screen.openCalls, [call])
        XCTAssertTrue(screen.isLastAnswer(screen.turns[1]))
        screen.send([.string(String(repeating: "the user ", count: 100))])
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.warning?.contains("start a new chat") == true, screen.warning ?? "none")
        XCTAssertEqual(screen.turns.count, 2, "no answer began")
        XCTAssertNil(screen.unanswered)
        XCTAssertEqual(screen.callsAsked, 0)
        chat.turns += [Message(.tool, "2", name: "f", result: .number(2)), Message(.assistant, "so")]
        screen.open(chat)
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.turns.map(\.text).suffix(2), ["f returned: 2", "so"])
        XCTAssertEqual(screen.turns.map(\.isReply), [false, true, false, true])
        XCTAssertEqual(screen.openCalls, [])
    }

    /// The page showed the app's results and an empty reply, which the chat doesn't have.
    func testOfAChainWhoseLastReplyNeverBeganOnlyWhatTheChatHasIsShown() async throws {
        let (screen, _) = try await loaded(pause: 0)
        do {
            _ = try await screen.showAnswer([]) { _, send in
                send(.began)
                send(.ended(.stopToken, text: "the", guarantee: nil))
                send(.result("noon"))
                send(.began)
                throw CancellationError()
            }
            XCTFail("it was not stopped")
        } catch { XCTAssertTrue(error is CancellationError, "\(error)") }
        XCTAssertEqual(screen.turns.map(\.text), ["the"])
        XCTAssertEqual(screen.answersEnded, 1)
    }

    func testToolsAreTheChatsAndRefusedOnesChangeNothing() async throws {
        let (screen, engine) = try await loaded(pause: 0)
        for refused in ["[", "{}", "[1]"] {
            do {
                try await screen.use(tools: refused)
                XCTFail("\(refused) was accepted")
            } catch { XCTAssertTrue(error is GemmaError, "\(error)") }
        }
        XCTAssertEqual(screen.settings.tools, "")
        let tools = #"[{"name": "f"}]"#
        try await screen.use(tools: tools)
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.settings.tools, tools)
        screen.use(AnswerFormat(schema: try Schema("{}")))
        try await waitUntilIdle(screen)
        screen.send("in")
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.turns.count, 0)
        XCTAssertTrue(screen.warning?.contains("tap Any answer in Schema") == true, screen.warning ?? "none")
        screen.use(AnswerFormat())
        try await waitUntilIdle(screen)
        screen.send("in")  // the tools take more than the context
        try await waitUntilIdle(screen)
        XCTAssertEqual(screen.unanswered, "in")
        let next = self.screen(engine)
        next.resume()
        try await waitUntilIdle(next)
        XCTAssertEqual(next.settings.tools, tools)
        try await next.use(tools: " [] ")
        XCTAssertEqual(next.settings.tools, "")
        try await waitUntilIdle(next)
        next.send("in")
        try await waitUntilIdle(next)
        XCTAssertEqual(next.turns.count, 2)
    }

    func testABenchmarkShowsItsFiguresAndCanBeStopped() async throws {
        let (screen, engine) = try await loaded(pause: 0)
        screen.benchmark()
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.result?.hasPrefix("FAIL\ntop-1 outside near ties is ") == true, screen.result ?? "none")
        XCTAssertTrue(screen.result?.contains("float kernels: 245 tokens") == true, screen.result ?? "none")
        let report = try shared(screen)
        XCTAssertTrue(report.contains("\"verdict\": \"FAIL\""), report)
        XCTAssertTrue(report.contains("\"runtime\": \"a script 1.0\""), report)
        XCTAssertEqual(screen.report?.lastPathComponent, "tiny.json")
        let prompt = "32 tokens: first after [0-9]+ ms, prefill [0-9.]+ tokens/s, then [0-9.]+"
        for line in ["load [0-9]+ ms, after checking", prompt] {
            XCTAssertNotNil(screen.result?.range(of: line, options: .regularExpression), screen.result ?? "none")
        }
        let calls = engine.calls
        screen.benchmark()
        try await waitUntil { engine.calls > calls }
        screen.stop()
        try await waitUntilIdle(screen)
        XCTAssertNil(screen.report)
        XCTAssertEqual(screen.status, "Stopped.")
    }

    func testABundleThatCannotBeLoadedGivesAWarning() async throws {
        let engine = SlowEngine(pause: 0)
        let folders = screen(engine)
        let screen = ChatScreen(library: folders.library, store: folders.store)
        screen.choose(tiny)
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.warning?.contains("is for onnx, which this app cannot run") == true, screen.warning ?? "")
        screen.choose(tiny.appendingPathComponent("nowhere"))
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.warning?.contains("manifest.json can't be read") == true, screen.warning ?? "")
        screen.benchmark()
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.warning?.contains("manifest.json can't be read") == true, screen.warning ?? "")
    }
}

@MainActor
private final class Shown {
    var events: [Int] = []
}
