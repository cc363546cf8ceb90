import Dispatch

/// Waiting times of a user, in milliseconds; nil where nothing was measured.
public struct Latency: Equatable, Sendable {
    public let loadMs: Double?
    public let firstTokenMs: Double?  // from sending to the first token, prefill included
    public let tokensPerSecond: Double?  // without the first token
    public let tokenP95Ms: Double?
    public let tokens: Int
}

/// Measures latency with a clock that returns nanoseconds.
public struct LatencyMeter {
    private let nanoTime: () -> UInt64
    private var loadMs: Double?
    private var started: UInt64 = 0
    private var last: UInt64 = 0
    private var firstTokenMs: Double?
    private var gaps: [Double] = []  // milliseconds between tokens

    public init(nanoTime: @escaping () -> UInt64 = { DispatchTime.now().uptimeNanoseconds }) {
        self.nanoTime = nanoTime
    }

    /// Call when loading starts.
    public mutating func startLoad() {
        started = nanoTime()
    }

    /// Call when the model is loaded.
    public mutating func loaded() {
        loadMs = millis(started, nanoTime())
    }

    /// Call when a prompt is sent.
    public mutating func start() {
        started = nanoTime()
        firstTokenMs = nil
        gaps = []
    }

    /// Call when a token is generated.
    public mutating func token() {
        let now = nanoTime()
        if firstTokenMs == nil { firstTokenMs = millis(started, now) } else { gaps.append(millis(last, now)) }
        last = now
    }

    public var latency: Latency {
        let total = gaps.reduce(0, +)
        return Latency(
            loadMs: loadMs,
            firstTokenMs: firstTokenMs,
            tokensPerSecond: total > 0 ? 1000 * Double(gaps.count) / total : nil,
            tokenP95Ms: gaps.isEmpty ? nil : quantile(gaps, 0.95),
            tokens: gaps.count + (firstTokenMs == nil ? 0 : 1)
        )
    }
}

private func millis(_ from: UInt64, _ to: UInt64) -> Double { Double(to - from) / 1e6 }

/// A quantile with linear interpolation, as in numpy.
func quantile(_ values: [Double], _ share: Double) -> Double {
    let sorted = values.sorted()
    let index = share * Double(sorted.count - 1)
    let below = Int(index)
    let above = min(below + 1, sorted.count - 1)
    return sorted[below] + (sorted[above] - sorted[below]) * (index - Double(below))
}
