import Dispatch
import Foundation

/// A figure over all repeats.
public struct Spread: Equatable, Sendable {
    public let median: Double
    public let low: Double
    public let high: Double

    init(_ values: [Double]) {
        median = quantile(values, 0.5)
        low = values.min() ?? 0
        high = values.max() ?? 0
    }
}

public struct PromptFigures: Equatable, Sendable {
    public let tokens: Int
    public let firstTokenMs: Spread
    public let tokensPerSecond: Spread
}

/// A bundle's speed on this device: the figures of `gemma-runtime bench` that one process can measure.
public struct Benchmark: Equatable, Sendable {
    public let repeats: Int
    public let newTokens: Int
    public let prompts: [PromptFigures]
    public let decodeTokensPerSecond: Spread
    public let tokenMs: Spread  // each repeat's median time of a new token
    public let tokenP95Ms: Spread
}

/// The tokens to run, as in `gemma_runtime/measure/bench.py`: the usual prompt lengths that fit the context.
public struct Workload: Equatable, Sendable {
    public let promptLengths: [Int]
    public let decodePrompt: Int
    public let newTokens: Int

    init(promptLengths: [Int], decodePrompt: Int, newTokens: Int) {
        self.promptLengths = promptLengths
        self.decodePrompt = decodePrompt
        self.newTokens = newTokens
    }

    public init(contextLength: Int) {
        let lengths = [32, 128, 512].filter { $0 <= contextLength }
        newTokens = min(64, max(1, contextLength / 2))
        promptLengths = lengths.isEmpty ? [contextLength] : lengths
        decodePrompt = max(1, min(128, contextLength - newTokens))
    }
}

/// Times prompts and new tokens, after one untimed prompt of the longest length.
///
/// Cancelling the task stops it between two runs of the model and leaves the session empty.
public func measureSpeed(
    _ session: Session, vocabSize: Int, _ workload: Workload, repeats: Int = 3,
    nanoTime: @escaping () -> UInt64 = { DispatchTime.now().uptimeNanoseconds }
) throws -> Benchmark {
    session.reset()
    defer { session.reset() }
    _ = try session.prefill(someTokens(vocabSize, workload.promptLengths.last ?? 1))
    let stopwatch = Stopwatch(session: session, vocabSize: vocabSize, nanoTime: nanoTime)
    let runs = try (0..<repeats).map { _ in try stopwatch.run(workload) }
    return Benchmark(
        repeats: repeats,
        newTokens: workload.newTokens,
        prompts: workload.promptLengths.indices.map { promptFigures(workload.promptLengths[$0], $0, runs) },
        decodeTokensPerSecond: Spread(runs.map { 1000 * Double($0.tokens.count) / $0.tokens.reduce(0, +) }),
        tokenMs: Spread(runs.map { quantile($0.tokens, 0.5) }),
        tokenP95Ms: Spread(runs.map { quantile($0.tokens, 0.95) })
    )
}

private struct Run {
    var prompts: [(prefillMs: Double, firstTokenMs: Double)] = []
    var tokens: [Double] = []
}

private struct Stopwatch {
    let session: Session
    let vocabSize: Int
    let nanoTime: () -> UInt64

    func run(_ workload: Workload) throws -> Run {
        var run = Run()
        for length in workload.promptLengths { run.prompts.append(try time(prompt: someTokens(vocabSize, length))) }
        session.reset()
        var token = try bestToken(session.prefill(someTokens(vocabSize, workload.decodePrompt)))
        for _ in 0..<workload.newTokens {
            try Task.checkCancellation()
            let started = nanoTime()
            token = try bestToken(session.decode(token))
            run.tokens.append(since(started))
        }
        return run
    }

    private func time(prompt: [Int]) throws -> (prefillMs: Double, firstTokenMs: Double) {
        try Task.checkCancellation()
        session.reset()
        let started = nanoTime()
        let logits = try session.prefill(prompt)
        let prefillMs = since(started)
        _ = try bestToken(logits)
        return (prefillMs, since(started))
    }

    private func since(_ started: UInt64) -> Double { Double(nanoTime() - started) / 1e6 }
}

private func promptFigures(_ length: Int, _ index: Int, _ runs: [Run]) -> PromptFigures {
    PromptFigures(
        tokens: length,
        firstTokenMs: Spread(runs.map(\.prompts[index].firstTokenMs)),
        tokensPerSecond: Spread(runs.map { 1000 * Double(length) / $0.prompts[index].prefillMs })
    )
}

/// The same ids on every run; which ids they are doesn't affect speed.
func someTokens(_ vocabSize: Int, _ count: Int) -> [Int] {
    (0..<count).map { ($0 * 7919 + count) % vocabSize }
}
