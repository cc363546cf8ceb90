#if canImport(OnnxSession)
import Foundation
import OnnxSession
import XCTest

@testable import GemmaKit

/// Runs a bundle on ONNX Runtime's C library, in this process.
final class OnnxEngine: Engine, @unchecked Sendable {
    let runtime = "ONNX Runtime"
    let givesEveryRow = true
    private let session: OpaquePointer
    private let vocabSize: Int

    init(_ bundle: ModelBundle, graph name: String) throws {
        let graph = try bundle.graph(name)
        vocabSize = bundle.manifest.vocabSize
        session = onnx_open(bundle.directory.appendingPathComponent(graph.file).path)
        try check()
        for (past, present) in try graph.returnedCaches() {
            let shape = try past.shape.map { Int64(try XCTUnwrap($0)) }
            onnx_add_cache(session, past.name, present.name, shape, shape.count)
            try check()
        }
    }

    deinit { onnx_close(session) }

    func run(_ tokens: [Int], position: Int, rows: Int) throws -> [[Float]] {
        var logits = [Float](repeating: 0, count: rows * vocabSize)
        let ids = tokens.map(Int64.init)
        onnx_run(session, ids, Int64(ids.count), Int32(position + ids.count), &logits, Int64(rows), Int64(vocabSize))
        try check()
        return (0..<rows).map { Array(logits[$0 * vocabSize..<($0 + 1) * vocabSize]) }
    }

    private func check() throws {
        if let error = onnx_error(session) { throw GemmaError.session(String(cString: error)) }
    }
}

/// The graphs that were opened. Only one task adds to it.
private final class Opened: @unchecked Sendable {
    private(set) var graphs: [String] = []

    func add(_ graph: String) { graphs.append(graph) }
}

final class OnnxTests: XCTestCase {
    func testGreedyTokensEqualPythonsOnONNXRuntime() async throws {
        let bundle = try ModelBundle.open(tiny)
        let session = EngineSession(try OnnxEngine(bundle, graph: "exact"), bundle.manifest)
        try await checkGreedyTokens(session)
        session.reset()  // and once more over the used caches
        try await checkGreedyTokens(session)
    }

    func testVerdictAndFiguresEqualThoseOfGemmaRuntimeVerify() async throws {
        let bundle = try ModelBundle.open(tiny)
        let opened = Opened()
        let session = try await BundleSession.open(bundle.manifest) { graph in
            opened.add(graph)
            return try OnnxEngine(bundle, graph: graph)
        }
        var progress: [Int] = []
        let verification = try await verifyBundle(bundle, session) { done, _ in progress.append(done) }
        XCTAssertEqual(verification.verdict, .pass, "\(verification.failures)")
        XCTAssertEqual(progress, Array(1...10))
        XCTAssertEqual(opened.graphs, ["decode", "exact", "decode"])
        let exact = try XCTUnwrap(verification.exact)
        try checkFigures(vectors().of("verify").of("lowering"), exact)
        XCTAssertGreaterThan(verification.lowering.meanKL, exact.meanKL, "the shipped graph rounds activations")
        let workload = Workload(contextLength: bundle.manifest.contextLength)
        let speed = try measureSpeed(session, vocabSize: bundle.manifest.vocabSize, workload, repeats: 2)
        try checkReport(bundle, verification, speed)
    }

    func testAnExactGraphThatRoundsActivationsFailsVerification() async throws {
        let bundle = try ModelBundle.open(tiny)
        let session = try await BundleSession.open(bundle.manifest) { _ in try OnnxEngine(bundle, graph: "decode") }
        let verification = try await verifyBundle(bundle, session)
        XCTAssertEqual(verification.verdict, .fail)
        let failure = verification.failures.first ?? ""
        XCTAssertTrue(failure.hasPrefix("mean KL of the float kernels is "), failure)
    }

    func testAnEditedQuestionIsAnsweredAsInANewConversation() async throws {
        let bundle = try ModelBundle.open(tiny)
        let session = try await BundleSession.open(bundle.manifest) { try OnnxEngine(bundle, graph: $0) }
        try await checkAnswersInEarlierPlaces(session, ChatCodec(bundle))
    }

    func testAConversationIsUnaffectedByAStoppedVerification() async throws {
        let bundle = try ModelBundle.open(tiny)
        let session = try await BundleSession.open(bundle.manifest) { try OnnxEngine(bundle, graph: $0) }
        func conversation() throws -> Conversation { try Conversation(session, try ChatCodec(bundle), Sampler(try Sampling())) }
        func answer(_ chat: Conversation, _ question: String) async throws -> String {
            let reply = try chat.send(question, maxNewTokens: 8)
            for try await _ in reply {}
            return reply.text
        }
        let chat = try conversation()
        let first = try await answer(chat, "the user in the inn")
        let task = Task {
            _ = try await verifyBundle(bundle, session) { done, _ in
                if done == 7 { withUnsafeCurrentTask { $0?.cancel() } }
            }
        }
        let outcome = await task.result
        XCTAssertThrowsError(try outcome.get()) { XCTAssertTrue($0 is CancellationError, "\($0)") }
        XCTAssertEqual(session.position, 0)
        let second = try await answer(chat, "the")
        let fresh = try conversation()
        let again = [try await answer(fresh, "the user in the inn"), try await answer(fresh, "the")]
        XCTAssertEqual(again, [first, second])
    }
}
#endif
