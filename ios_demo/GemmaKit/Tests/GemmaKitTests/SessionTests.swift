import Foundation
import XCTest

@testable import GemmaKit

final class SessionTests: XCTestCase {
    /// Counts its calls, and cancels the task at one of them.
    private final class CancellingEngine: Engine, @unchecked Sendable {
        let runtime = "a script"
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

    /// Notes how many tokens and rows each run has.
    private final class CountingEngine: Engine, @unchecked Sendable {
        let runtime = "a recorder"
        let givesEveryRow = true
        var runs: [[Int]] = []

        func run(_ tokens: [Int], position: Int, rows: Int) throws -> [[Float]] {
            runs.append([tokens.count, rows])
            return [[Float]](repeating: [Float](repeating: 0, count: 376), count: rows)
        }
    }

    /// E2B's graph answered with NaN for the tokens whose window had left the ring that its layers share.
    func testScoredChunksEndWhereARingThatLayersShareIsFullAsInPython() throws {
        let cases = try json(data.appendingPathComponent("session_vectors.json")).of("scored").list { item -> Bool in
            let engine = CountingEngine()
            let session = EngineSession(engine, try manifest(of: item))
            let before = try item.of("before").count()
            if before > 0 { _ = try session.prefill([Int](repeating: 2, count: before)) }
            engine.runs = []
            _ = try session.score([Int](repeating: 2, count: item.of("count").count()))
            XCTAssertEqual(engine.runs, try item.of("runs").list { try $0.ints() })
            return true
        }
        XCTAssertEqual(cases.count, 20)
    }

    /// The tiny bundle's manifest with the layers and lengths of a case.
    private func manifest(of item: JSONFields) throws -> Manifest {
        let content = try JSONSerialization.jsonObject(with: Data(contentsOf: tiny.appendingPathComponent("manifest.json")))
        var fields = try XCTUnwrap(content as? [String: Any])
        fields["layers"] = try item.of("layers").list { layer -> [String: Any] in
            let numbers = try layer.list { $0.value == .null ? nil : try $0.count() }
            var field: [String: Any] = ["kind": numbers[0] == nil ? "global" : "local", "kv_heads": 1, "head_dim": 4]
            for (name, number) in zip(["window", "slots", "source"], numbers) { field[name] = number }
            return field
        }
        fields["context_length"] = try item.of("context").count()
        fields["prefill_length"] = try item.of("prefill").count()
        return try Manifest.parse(JSONSerialization.data(withJSONObject: fields))
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
