import Foundation
import GemmaKit
import XCTest

@testable import GemmaChat

/// Generates one token over and over, slowly, and records whether two calls overlapped.
private final class SlowEngine: Engine, @unchecked Sendable {
    let givesEveryRow = true
    let pause: TimeInterval
    private let lock = NSLock()
    private var inside = 0
    private(set) var overlapped = false
    private(set) var calls = 0

    init(pause: TimeInterval) {
        self.pause = pause
    }

    func run(_ tokens: [Int], position: Int, rows: Int) throws -> [[Float]] {
        lock.withLock {
            inside += 1
            calls += 1
            overlapped = overlapped || inside > 1
        }
        Thread.sleep(forTimeInterval: pause)
        lock.withLock { inside -= 1 }
        var row = [Float](repeating: 0, count: 376)
        row[300] = 100
        return [[Float]](repeating: row, count: rows)
    }
}

@MainActor
final class ChatScreenTests: XCTestCase {
    private let tiny = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
        .appendingPathComponent("../../../../tests/data/tiny").standardizedFileURL

    private func loaded(pause: TimeInterval = 0.002) async throws -> (ChatScreen, SlowEngine) {
        let engine = SlowEngine(pause: pause)
        let screen = ChatScreen { _, _ in engine }
        screen.load(tiny)
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.status.hasPrefix("tiny · app "), screen.status)
        return (screen, engine)
    }

    private func waitUntilIdle(_ screen: ChatScreen) async throws {
        try await waitUntil { !screen.busy }
    }

    private func waitUntil(_ reached: () -> Bool) async throws {
        for _ in 0..<10_000 where !reached() { try await Task.sleep(for: .milliseconds(1)) }
        XCTAssertTrue(reached())
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
        screen.send("more")
        try await waitUntilIdle(screen)
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

    func testLowMemoryDuringAReplyUnloadsTheModelAndWarns() async throws {
        let (screen, engine) = try await loaded()
        screen.send("the user")
        try await waitUntil { engine.calls > 4 }
        screen.unload()
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.warning?.hasPrefix("Memory is low") == true)
        let calls = engine.calls
        screen.send("anyone?")
        try await waitUntilIdle(screen)
        XCTAssertEqual(engine.calls, calls)
        XCTAssertTrue(screen.warning?.contains("tap Bundle") == true)
    }

    func testAnAnswerIsCheckedAgainstTheSchema() async throws {
        let (screen, _) = try await loaded(pause: 0)
        screen.use(schema: "{\"type\": 3}")
        XCTAssertTrue(screen.warning?.contains("\"type\"") == true)
        XCTAssertNil(screen.schema)
        screen.use(schema: #"{"type": "object"}"#)
        XCTAssertNil(screen.warning)
        screen.send("x")
        try await waitUntilIdle(screen)
        // The context has no room for a second attempt, which gives a warning.
        XCTAssertTrue(screen.warning?.contains("start a new chat") == true, "\(screen.warning ?? "")")
        screen.use(schema: "")
        XCTAssertNil(screen.schema)
    }

    func testABenchmarkShowsItsFiguresAndCanBeStopped() async throws {
        let (screen, engine) = try await loaded(pause: 0)
        screen.benchmark()
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.result?.hasPrefix("FAIL\ntop-1 outside near ties is ") == true, screen.result ?? "none")
        XCTAssertTrue(screen.result?.contains("float kernels: 245 tokens") == true, screen.result ?? "none")
        XCTAssertTrue(screen.report?.contains("\"verdict\": \"FAIL\"") == true)
        let calls = engine.calls
        screen.benchmark()
        try await waitUntil { engine.calls > calls }
        screen.stop()
        try await waitUntilIdle(screen)
        XCTAssertNil(screen.report)
        XCTAssertEqual(screen.status, "Stopped.")
    }

    func testABundleThatCannotBeLoadedGivesAWarning() async throws {
        let screen = ChatScreen()
        screen.load(tiny)
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.warning?.contains("is for onnx, which this app cannot run") == true, screen.warning ?? "")
        screen.load(tiny.appendingPathComponent("nowhere"))
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.warning?.contains("manifest.json can't be read") == true, screen.warning ?? "")
        screen.benchmark()
        try await waitUntilIdle(screen)
        XCTAssertTrue(screen.warning?.contains("no bundle is loaded") == true)
    }
}
