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
    public let decodeTokensPerSecond: Spread?  // after the prompt; nil if the context has no room for the new tokens
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

/// The tokens to run, as in `gemma_runtime/measure/bench.py`: the usual prompt lengths that fit the context, and one that
/// leaves room to decode, after which the main figures of decoding are taken.
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
        newTokens = min(64, max(1, contextLength / 2))
        decodePrompt = max(1, min(128, contextLength - newTokens))
        promptLengths = Set([32, 128, 512, 2048].filter { $0 <= contextLength } + [decodePrompt]).sorted()
    }
}

/// Times prompts and the new tokens after each, after one untimed prompt of the longest length.
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
    let tokens = runs.map { run in run[workload.promptLengths.firstIndex(of: workload.decodePrompt) ?? 0].tokens }
    return Benchmark(
        repeats: repeats,
        newTokens: workload.newTokens,
        prompts: workload.promptLengths.indices.map { promptFigures(workload.promptLengths[$0], $0, runs) },
        decodeTokensPerSecond: Spread(tokens.map(perSecond)),
        tokenMs: Spread(tokens.map { quantile($0, 0.5) }),
        tokenP95Ms: Spread(tokens.map { quantile($0, 0.95) })
    )
}

private struct PromptTime {
    let prefillMs: Double
    let firstTokenMs: Double
    let tokens: [Double]  // milliseconds of each new token; none without room for all
}

private struct Stopwatch {
    let session: Session
    let vocabSize: Int
    let nanoTime: () -> UInt64

    func run(_ workload: Workload) throws -> [PromptTime] {
        try workload.promptLengths.map { try time(prompt: someTokens(vocabSize, $0), newTokens: workload.newTokens) }
    }

    private func time(prompt: [Int], newTokens: Int) throws -> PromptTime {
        try Task.checkCancellation()
        session.reset()
        let started = nanoTime()
        let logits = try session.prefill(prompt)
        let prefillMs = since(started)
        let first = try bestToken(logits)
        let firstTokenMs = since(started)
        let fits = prompt.count + newTokens <= session.contextLength
        let tokens = try time(after: first, count: fits ? newTokens : 0)
        return PromptTime(prefillMs: prefillMs, firstTokenMs: firstTokenMs, tokens: tokens)
    }

    private func time(after first: Int, count: Int) throws -> [Double] {
        var token = first
        return try (0..<count).map { _ in
            try Task.checkCancellation()
            let started = nanoTime()
            token = try bestToken(session.decode(token))
            return since(started)
        }
    }

    private func since(_ started: UInt64) -> Double { Double(nanoTime() - started) / 1e6 }
}

private func promptFigures(_ length: Int, _ index: Int, _ runs: [[PromptTime]]) -> PromptFigures {
    let times = runs.map { $0[index] }
    return PromptFigures(
        tokens: length,
        firstTokenMs: Spread(times.map(\.firstTokenMs)),
        tokensPerSecond: Spread(times.map { 1000 * Double(length) / $0.prefillMs }),
        decodeTokensPerSecond: times.allSatisfy(\.tokens.isEmpty) ? nil : Spread(times.map { perSecond($0.tokens) })
    )
}

private func perSecond(_ tokenMs: [Double]) -> Double { 1000 * Double(tokenMs.count) / tokenMs.reduce(0, +) }

/// The same ids on every run; which ids they are doesn't affect speed.
func someTokens(_ vocabSize: Int, _ count: Int) -> [Int] {
    (0..<count).map { ($0 * 7919 + count) % vocabSize }
}
