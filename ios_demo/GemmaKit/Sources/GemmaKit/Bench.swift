import Dispatch
import Foundation

/// One figure over the repeats.
public struct Spread: Equatable {
    public let median: Double
    public let low: Double
    public let high: Double

    init(_ values: [Double]) {
        median = quantile(values, 0.5)
        low = values.min() ?? 0
        high = values.max() ?? 0
    }
}

public struct PromptFigures: Equatable {
    public let tokens: Int
    public let firstTokenMillis: Spread
    public let tokensPerSecond: Spread
}

/// How fast a bundle is here: of the figures of `gemma-runtime bench` those that one process can measure.
public struct Benchmark: Equatable {
    public let repeats: Int
    public let newTokens: Int
    public let prompts: [PromptFigures]
    public let decodeTokensPerSecond: Spread
    public let tokenMillis: Spread  // the median new token of each repeat
    public let tokenP95Millis: Spread
}

/// The tokens that are run, as in `gemma_runtime/measure/bench.py`: the usual prompts, as far as they fit.
public struct Workload: Equatable {
    public let promptLengths: [Int]
    public let decodePrompt: Int
    public let newTokens: Int

    init(promptLengths: [Int], decodePrompt: Int, newTokens: Int) {
        self.promptLengths = promptLengths
        self.decodePrompt = decodePrompt
        self.newTokens = newTokens
    }

    public init(contextLength: Int) {
        let fitting = [32, 128, 512].filter { $0 <= contextLength }
        newTokens = min(64, max(1, contextLength / 2))
        promptLengths = fitting.isEmpty ? [contextLength] : fitting
        decodePrompt = max(1, min(128, contextLength - newTokens))
    }
}

/// Times prompts and new tokens, after one untimed prompt of the longest length.
///
/// Cancelling the task ends it between two runs of the model, and leaves the session empty.
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
        tokenMillis: Spread(runs.map { quantile($0.tokens, 0.5) }),
        tokenP95Millis: Spread(runs.map { quantile($0.tokens, 0.95) })
    )
}

/// The most memory that this process ever held, in bytes.
public func peakResidentBytes() -> Double {
    var usage = rusage()
    #if canImport(Darwin)
    getrusage(RUSAGE_SELF, &usage)
    return Double(usage.ru_maxrss)
    #else
    getrusage(__rusage_who_t(RUSAGE_SELF.rawValue), &usage)
    return Double(usage.ru_maxrss) * 1024  // Linux counts kilobytes
    #endif
}

private struct Run {
    var prompts: [(prefill: Double, firstToken: Double)] = []
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

    private func time(prompt: [Int]) throws -> (prefill: Double, firstToken: Double) {
        try Task.checkCancellation()
        session.reset()
        let started = nanoTime()
        let logits = try session.prefill(prompt)
        let filled = since(started)
        _ = try bestToken(logits)
        return (filled, since(started))
    }

    private func since(_ started: UInt64) -> Double { Double(nanoTime() - started) / 1e6 }
}

private func promptFigures(_ length: Int, _ place: Int, _ runs: [Run]) -> PromptFigures {
    PromptFigures(
        tokens: length,
        firstTokenMillis: Spread(runs.map(\.prompts[place].firstToken)),
        tokensPerSecond: Spread(runs.map { 1000 * Double(length) / $0.prompts[place].prefill })
    )
}

/// The same ids every time: speed doesn't depend on what they mean.
private func someTokens(_ vocabSize: Int, _ count: Int) -> [Int] {
    (0..<count).map { ($0 * 7919 + count) % vocabSize }
}
