import XCTest

@testable import GemmaKit

final class SessionTests: XCTestCase {
    /// Counts its calls, and cancels the task at one of them.
    private final class CancellingEngine: Engine, @unchecked Sendable {
        let givesEveryRow = true
        var calls = 0
        let cancelledAt: Int

        init(cancelledAt: Int) {
            self.cancelledAt = cancelledAt
        }

        func run(_ tokens: [Int], position: Int, rows: Int) throws -> [[Float]] {
            calls += 1
            if calls == cancelledAt { withUnsafeCurrentTask { $0?.cancel() } }
            return [[Float]](repeating: [Float](repeating: 0, count: 376), count: rows)
        }
    }

    func testStoppingDuringALongPromptEndsItAfterTheChunkAndTheConversationGoesOnFromThere() async throws {
        let manifest = try ModelBundle.read(tiny).manifest
        let engine = CancellingEngine(cancelledAt: 2)
        let session = EngineSession(engine, manifest)
        let chat = try Conversation(session, tinyCodec(), Sampler(try Sampling()))
        let question = String(repeating: "a", count: 60)
        let task = Task { for try await _ in try chat.send(question) {} }
        let outcome = await task.result
        XCTAssertThrowsError(try outcome.get()) { XCTAssertTrue($0 is CancellationError, "\($0)") }
        XCTAssertEqual(engine.calls, 2, "of five chunks")
        XCTAssertEqual(session.position, 2 * manifest.prefillLength)
        XCTAssertEqual(chat.messages, [], "a question without a reply is left out")
        _ = try await chat.send(question, maxNewTokens: 1).next()
        let whole = try encodeChat(tinyCodec().tokenizer, tinyCodec().format, [Message(.user, question)])
        XCTAssertEqual(session.position, whole.count)
        XCTAssertEqual(engine.calls, 2 + (whole.count - 2 * manifest.prefillLength + 15) / 16)
    }
}
