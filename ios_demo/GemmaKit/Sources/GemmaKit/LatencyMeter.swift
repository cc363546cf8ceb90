import Dispatch

/// What a user waited for. Milliseconds; nil where nothing was measured.
public struct Latency: Equatable, Sendable {
    public let loadMillis: Double?
    public let firstTokenMillis: Double?  // from the send to the first token, prefill included
    public let tokensPerSecond: Double?  // of the tokens after the first
    public let tokenP95Millis: Double?
    public let tokens: Int
}

/// Measures with a clock that counts nanoseconds.
public struct LatencyMeter {
    private let nanoTime: () -> UInt64
    private var loadMillis: Double?
    private var started: UInt64 = 0
    private var last: UInt64 = 0
    private var firstTokenMillis: Double?
    private var gaps: [Double] = []  // milliseconds between tokens

    public init(nanoTime: @escaping () -> UInt64 = { DispatchTime.now().uptimeNanoseconds }) {
        self.nanoTime = nanoTime
    }

    /// Loading begins.
    public mutating func startLoad() {
        started = nanoTime()
    }

    /// The model is loaded.
    public mutating func loaded() {
        loadMillis = millis(started, nanoTime())
    }

    /// A prompt is sent.
    public mutating func start() {
        started = nanoTime()
        firstTokenMillis = nil
        gaps = []
    }

    /// A token came.
    public mutating func token() {
        let now = nanoTime()
        if firstTokenMillis == nil { firstTokenMillis = millis(started, now) } else { gaps.append(millis(last, now)) }
        last = now
    }

    public var latency: Latency {
        let whole = gaps.reduce(0, +)
        return Latency(
            loadMillis: loadMillis,
            firstTokenMillis: firstTokenMillis,
            tokensPerSecond: whole > 0 ? 1000 * Double(gaps.count) / whole : nil,
            tokenP95Millis: gaps.isEmpty ? nil : quantile(gaps, 0.95),
            tokens: gaps.count + (firstTokenMillis == nil ? 0 : 1)
        )
    }
}

private func millis(_ from: UInt64, _ to: UInt64) -> Double { Double(to - from) / 1e6 }

/// A quantile with linear interpolation, as numpy's.
func quantile(_ values: [Double], _ share: Double) -> Double {
    let sorted = values.sorted()
    let place = share * Double(sorted.count - 1)
    let below = Int(place)
    let above = min(below + 1, sorted.count - 1)
    return sorted[below] + (sorted[above] - sorted[below]) * (place - Double(below))
}
