import Dispatch

/// What the device says of itself; nil where it says nothing.
public struct Condition: Equatable, Sendable {
    public let thermal: String?
    public let memoryBytes: Double?

    public init(thermal: String?, memoryBytes: Double?) {
        self.thermal = thermal
        self.memoryBytes = memoryBytes
    }
}

/// A few seconds of decoding. The time of prompts is not in its rate.
public struct Span: Equatable, Sendable {
    public let seconds: Double  // from the start to its end
    public let tokensPerSecond: Double
    public let condition: Condition  // at its end
}

/// How decoding speed holds up over minutes: the figures of `gemma-runtime bench --sustained`.
public struct Sustained: Equatable, Sendable {
    public let minutes: Double
    public let roundTokens: Int  // new tokens of each round
    public let promptTokens: Int  // of each round
    public let newTokens: Int  // of all rounds
    public let spans: [Span]

    public var first: Double { spans.first?.tokensPerSecond ?? 0 }
    public var last: Double { spans.last?.tokensPerSecond ?? 0 }
    public var lowest: Double { spans.map(\.tokensPerSecond).min() ?? 0 }
}

/// Decodes for some minutes, in rounds of a prompt and new tokens, so that every span sees the same lengths.
///
/// The last span is left out if it is shorter than half of the others, unless it is the only one. Cancelling the task
/// stops it between two runs of the model and leaves the session empty.
public func measureSustained(
    _ session: Session, vocabSize: Int, _ workload: Workload, minutes: Double = 10,
    nanoTime: @escaping () -> UInt64 = { DispatchTime.now().uptimeNanoseconds }, condition: @escaping () -> Condition,
    onSpan: @escaping (Span) -> Void = { _ in }
) throws -> Sustained {
    let prompt = someTokens(vocabSize, workload.decodePrompt)
    session.reset()
    defer { session.reset() }
    _ = try session.prefill(prompt)  // untimed: the first call is slower
    var spans = SpanMeter(nanoTime: nanoTime, condition: condition, onSpan: onSpan)
    var token = 0
    while spans.elapsedNanos() < UInt64((minutes * 60e9).rounded()) {
        try Task.checkCancellation()
        if spans.total % workload.newTokens == 0 {
            session.reset()
            token = try bestToken(session.prefill(prompt))
        }
        token = try spans.token { try bestToken(session.decode(token)) }
    }
    return Sustained(
        minutes: minutes, roundTokens: workload.newTokens, promptTokens: workload.decodePrompt, newTokens: spans.total,
        spans: spans.end())
}

private let spanSeconds = 5.0

/// Cuts decoding into spans.
private struct SpanMeter {
    private let nanoTime: () -> UInt64
    private let condition: () -> Condition
    private let onSpan: (Span) -> Void
    private var spans: [Span] = []
    private let started: UInt64
    private var now: UInt64
    private var since: UInt64
    private var tokens = 0
    private var decodingNanos: UInt64 = 0
    private(set) var total = 0

    init(nanoTime: @escaping () -> UInt64, condition: @escaping () -> Condition, onSpan: @escaping (Span) -> Void) {
        self.nanoTime = nanoTime
        self.condition = condition
        self.onSpan = onSpan
        started = nanoTime()
        (now, since) = (started, started)
    }

    mutating func elapsedNanos() -> UInt64 {
        now = nanoTime()
        return now - started
    }

    mutating func token(_ decode: () throws -> Int) rethrows -> Int {
        let before = nanoTime()
        let token = try decode()
        now = nanoTime()
        total += 1
        tokens += 1
        decodingNanos += now - before
        if seconds(since, now) >= spanSeconds {
            add()
            (since, tokens, decodingNanos) = (now, 0, 0)
        }
        return token
    }

    mutating func end() -> [Span] {
        if tokens > 0 && (spans.isEmpty || seconds(since, now) >= spanSeconds / 2) { add() }
        return spans
    }

    private mutating func add() {
        let rate = 1e9 * Double(tokens) / Double(decodingNanos)
        let span = Span(seconds: seconds(started, now), tokensPerSecond: rate, condition: condition())
        spans.append(span)
        onSpan(span)
    }

    private func seconds(_ from: UInt64, _ to: UInt64) -> Double { Double(to - from) / 1e9 }
}
