import Foundation
import XCTest

@testable import GemmaKit

/// A session that returns the goldens' logits, changed by `damage`.
private final class ReplayingSession: Session {
    private let goldens: [Golden]
    private let damage: (inout [Float]) throws -> Void
    private var tokens: [Int] = []
    let contextLength = 4096

    init(_ goldens: [Golden], damage: @escaping (inout [Float]) throws -> Void = { _ in }) {
        self.goldens = goldens
        self.damage = damage
    }

    var position: Int { tokens.count }

    func prefill(_ new: [Int]) throws -> [Float] { try score(new).last ?? [] }

    func score(_ new: [Int]) throws -> [[Float]] {
        try new.map { token in
            tokens.append(token)
            var row = goldenRow()
            try damage(&row)
            return row
        }
    }

    func rewind(to target: Int) throws -> Int {
        tokens.removeSubrange(target...)
        return position
    }

    func reset() {
        tokens = []
    }

    private func goldenRow() -> [Float] {
        var row = [Float](repeating: -30, count: 376)
        guard let golden = goldens.first(where: { $0.tokens.starts(with: tokens) }) else { return row }
        let index = tokens.count - 1 - (golden.tokens.count - golden.judged)
        guard index >= 0 else { return row }
        for (id, logit) in zip(golden.quantized.ids[index], golden.quantized.logits[index]) { row[id] = Float(logit) }
        return row
    }
}

final class VerifyTests: XCTestCase {
    private func goldens() throws -> [Golden] { try loadGoldens(ModelBundle.open(tiny)) }

    func testLimitsEqualThoseOfGemmaRuntimeVerify() throws {
        let limits = try vectors().of("limits").map(\.value)
        XCTAssertEqual(Set(limits.keys), ["onnx", "executorch", "coreml"])
        for (target, expected) in limits { XCTAssertEqual(limitsJSON(Limits.of(target: target)), expected, target) }
    }

    func testAnExceededLimitFailsWithTheMessageOfGemmaRuntimeVerify() throws {
        let goldens = try goldens()
        XCTAssertEqual(try verify(ReplayingSession(goldens), goldens, Limits(maxMeanKL: 1e9)).verdict, .pass)
        let exact = Agreement(positions: 10, top1: 1, nearTies: 0, maxAbs: 0, meanAbs: 0, meanKL: 2.344e-6, p99KL: 0)
        let verification = try verify(ReplayingSession(goldens), goldens, Limits(maxMeanKL: 1e9), exact)
        XCTAssertEqual(verification.verdict, .fail)
        XCTAssertEqual(verification.failures, ["mean KL of the float kernels is 2.34e-06, above 1e-06"])
        let impossible = try verify(ReplayingSession(goldens), goldens, Limits(minTop1: 1.01, maxMeanKL: 1e9))
        XCTAssertEqual(impossible.failures, ["top-1 outside near ties is 100.0%, below 101%"])
    }

    func testANaNAndADifferentTopTokenFail() throws {
        let goldens = try goldens()
        let nan = try verify(ReplayingSession(goldens) { $0[7] = .nan }, goldens, Limits())
        XCTAssertEqual(nan.verdict, .fail)
        let other = try verify(ReplayingSession(goldens) { $0[7] = 9 }, goldens, Limits(maxMeanKL: 1e9))
        XCTAssertEqual(other.failures.count, 1)
        XCTAssertTrue(other.failures[0].hasPrefix("top-1 outside near ties is "))
    }

    func testAStoppedReplayLeavesTheSessionEmpty() async throws {
        let goldens = try goldens()
        var rows = 0
        let session = ReplayingSession(goldens) { _ in
            rows += 1
            if rows == 20 { throw GemmaError.session("ended") }
        }
        XCTAssertThrowsError(try verify(session, goldens, Limits()))
        XCTAssertEqual(session.position, 0)
        let speed = ReplayingSession(goldens) { _ in throw GemmaError.session("ended") }
        XCTAssertThrowsError(try measureSpeed(speed, vocabSize: 376, Workload(contextLength: 96)))
        XCTAssertEqual(speed.position, 0)
    }

    func testSpansOfSustainedDecodingArePythons() throws {
        let workload = Workload(promptLengths: [4], decodePrompt: 6, newTokens: 10)
        _ = try json(data.appendingPathComponent("sustained_vectors.json")).list { vector in
            var now = 0.0
            let pace = try vector.of("pace").list { try $0.list { try $0.double() } }
            let session = ScriptedSession { tokens in
                now += tokens.count == 6 ? 0.5 : pace.last { $0[0] <= now }![1]
                return 3
            }
            var seen: [Span] = []
            let sustained = try measureSustained(
                session, vocabSize: 400, workload, minutes: vector.of("seconds").double() / 60,
                nanoTime: { UInt64((now * 1e9).rounded()) }, condition: { Condition(thermal: "fair", memoryBytes: now) },
                onSpan: { seen.append($0) })
            let expected = try vector.of("spans").list { try $0.list { try $0.double() } }
            XCTAssertEqual(sustained.spans, seen)
            XCTAssertEqual(seen.count, expected.count)
            for (span, numbers) in zip(seen, expected) {
                XCTAssertEqual(span.seconds, numbers[0], accuracy: 1e-6)
                XCTAssertEqual(span.tokensPerSecond, numbers[1], accuracy: 1e-6)
                XCTAssertEqual(span.condition.thermal, "fair")
            }
            XCTAssertEqual(sustained.newTokens, try vector.of("new_tokens").count())
            XCTAssertEqual(sustained.lowest, expected.map { $0[1] }.min() ?? 0, accuracy: 1e-6)
            XCTAssertEqual(session.position, 0)
        }
    }

    func testASustainedRunThatIsStoppedLeavesTheSessionEmpty() async throws {
        let task = Task {
            let session = ScriptedSession { _ in 3 }
            let workload = Workload(promptLengths: [4], decodePrompt: 6, newTokens: 10)
            let result = Result {
                try measureSustained(
                    session, vocabSize: 400, workload, condition: { Condition(thermal: nil, memoryBytes: nil) },
                    onSpan: { _ in })
            }
            XCTAssertEqual(session.position, 0)
            return result
        }
        task.cancel()
        do {
            _ = try await task.value.get()
            XCTFail("it was not stopped")
        } catch { XCTAssertTrue(error is CancellationError, "\(error)") }
    }

    func testSpeedFollowsTheClock() throws {
        var now: UInt64 = 0
        let session = ScriptedSession { tokens in
            now += 20_000_000
            return 3
        }
        let workload = Workload(promptLengths: [4, 8], decodePrompt: 4, newTokens: 3)
        let benchmark = try measureSpeed(session, vocabSize: 400, workload, repeats: 2, nanoTime: { now })
        XCTAssertEqual(benchmark.prompts.map(\.tokens), [4, 8])
        XCTAssertEqual(benchmark.prompts[1].firstTokenMs, Spread([20]))
        XCTAssertEqual(benchmark.prompts[0].tokensPerSecond.median, 200, accuracy: 1e-9)
        XCTAssertEqual(benchmark.prompts.map(\.decodeTokensPerSecond), [Spread([50]), Spread([50])])
        XCTAssertEqual(benchmark.decodeTokensPerSecond, Spread([50]))
        XCTAssertEqual(benchmark.tokenP95Ms.high, 20)
        _ = try vectors().of("workloads").list { item in
            let expected = Workload(
                promptLengths: try item.of("prompt_lengths").ints(), decodePrompt: try item.of("decode_prompt").count(),
                newTokens: try item.of("new_tokens").count())
            XCTAssertEqual(Workload(contextLength: try item.of("context_length").count()), expected)
        }
        XCTAssertEqual([Spread([4, 1, 2, 3]).median, Spread([4, 1, 2, 3]).low, Spread([4, 1, 2, 3]).high], [2.5, 1, 4])
    }
}
