import Foundation

/// How to choose a token. The defaults are greedy. The filters and their order are those of `gemma_runtime`.
public struct Sampling: Equatable, Sendable {
    public let temperature: Double  // 0 is greedy and ignores the filters below
    public let topK: Int  // keep the k most likely tokens; 0 keeps all
    public let topP: Double  // keep the fewest tokens that hold this share of probability
    public let minP: Double  // keep tokens at least this likely relative to the best
    public let repetitionPenalty: Double  // 1 is off

    public init(
        temperature: Double = 0, topK: Int = 0, topP: Double = 1, minP: Double = 0, repetitionPenalty: Double = 1
    ) throws {
        try check("temperature", temperature, temperature >= 0 && temperature.isFinite, "0 or more")
        try check("top_k", topK, topK >= 0, "0 or more")
        try check("top_p", topP, topP > 0 && topP <= 1, "more than 0 and at most 1")
        try check("min_p", minP, (0...1).contains(minP), "from 0 to 1")
        let penalties = Double(Float.leastNormalMagnitude)...Double(Float.greatestFiniteMagnitude)
        try check("repetition_penalty", repetitionPenalty, penalties.contains(repetitionPenalty), "a float32 above 0")
        self.temperature = temperature
        self.topK = topK
        self.topP = topP
        self.minP = minP
        self.repetitionPenalty = repetitionPenalty
    }
}

private func check<T>(_ name: String, _ value: T, _ valid: Bool, _ expected: String) throws {
    guard valid else { throw GemmaError.session("\(name) is \(value), expected \(expected)") }
}

/// Chooses tokens. `noise` returns numbers of at least 0 and below 1: those of a `SeededNoise` are always the same.
public struct Sampler {
    private let sampling: Sampling
    private let noise: () -> Double
    private let seed: UInt64?

    public init(_ sampling: Sampling, noise: @escaping () -> Double = { Double.random(in: 0..<1) }) {
        self.sampling = sampling
        self.noise = noise
        seed = nil
    }

    /// With a seed, each reply draws the same numbers, those of `--seed`.
    public init(_ sampling: Sampling, seed: UInt64) {
        self.sampling = sampling
        var drawn = SeededNoise(seed: seed)
        noise = { drawn.next() }
        self.seed = seed
    }

    /// The sampler for another reply: with a seed, from its beginning.
    func forReply() -> Sampler { seed.map { Sampler(sampling, seed: $0) } ?? self }

    /// Chooses a token from logits, (V); `previous` are the tokens so far, prompt included. Tokens that are not
    /// `allowed` are dropped before any filter.
    public func pick(_ logits: [Float], previous: [Int], allowed: ((Int) throws -> Bool)? = nil) throws -> Int {
        var penalized = penalize(logits, previous, sampling.repetitionPenalty)
        if let allowed { penalized = try onlyAllowed(penalized, allowed) }
        let best = try bestToken(penalized)
        if sampling.temperature == 0 { return best }
        let candidates = candidates(penalized, highest: penalized[best])
        let drawn = noise() * candidates.reduce(0) { $0 + $1.share }
        var sum = 0.0
        for candidate in candidates {
            sum += candidate.share
            if sum > drawn { return candidate.token }
        }
        return candidates[candidates.count - 1].token
    }

    /// The logits of the likeliest allowed tokens, as many as the filters look at; the others are minus infinity.
    private func onlyAllowed(_ logits: [Float], _ allowed: (Int) throws -> Bool) throws -> [Float] {
        let wanted = sampling.temperature == 0 ? 1 : sampling.topK
        var tried = wanted == 0 ? logits.count : max(wanted, firstTried)
        while true {
            let threshold = kthLargest(logits, tried)
            let kept = try logits.indices.filter { try logits[$0] >= threshold && allowed($0) }
            if kept.count >= max(wanted, 1) || tried >= logits.count { return try only(kept, logits) }
            tried *= 16
        }
    }

    private func candidates(_ logits: [Float], highest: Float) -> [Candidate] {
        let threshold = max(kthLargest(logits, sampling.topK), -.greatestFiniteMagnitude)  // -inf is not allowed
        var candidates = logits.indices.filter { logits[$0] >= threshold }.map { token in
            Candidate(token: token, share: exp((Double(logits[token]) - Double(highest)) / sampling.temperature))
        }
        if sampling.topP < 1 { candidates = nucleus(candidates, sampling.topP) }
        return sampling.minP == 0 ? candidates : candidates.filter { $0.share >= sampling.minP }
    }
}

private let firstTried = 64  // the likeliest token that a JSON grammar allows is nearly always among these

private func only(_ kept: [Int], _ logits: [Float]) throws -> [Float] {
    guard !kept.isEmpty else { throw GemmaError.session("the grammar allows none of the model's tokens here") }
    var masked = [Float](repeating: -.infinity, count: logits.count)
    for token in kept { masked[token] = logits[token] }
    return masked
}

/// A token that may be drawn, and its probability relative to the best one's.
private struct Candidate {
    let token: Int
    let share: Double
}

/// The token with the largest logit; throws a session error if a logit is NaN or the largest is infinite.
func bestToken(_ logits: [Float]) throws -> Int {
    var best = 0
    for token in logits.indices where logits[token] > logits[best] || logits[token].isNaN {
        best = token
        if logits[best].isNaN { break }
    }
    guard !logits.isEmpty, logits[best].isFinite else {
        throw GemmaError.session("the largest logit is not a finite number: the artifact overflows; run the benchmark on it")
    }
    return best
}

/// Lowers the logits of previous tokens, once per distinct token.
private func penalize(_ logits: [Float], _ previous: [Int], _ penalty: Double) -> [Float] {
    guard penalty != 1 else { return logits }
    var penalized = logits
    let factor = Float(penalty)
    for token in Set(previous) where logits.indices.contains(token) {
        penalized[token] = logits[token] < 0 ? logits[token] * factor : logits[token] / factor
    }
    return penalized
}

/// The k-th largest logit; minus infinity for k = 0. More than k logits may reach it, by ties.
func kthLargest(_ logits: [Float], _ k: Int) -> Float {
    guard k > 0, k < logits.count else { return -.infinity }
    var largest = Heap<Float>()
    for logit in logits {
        if largest.elements.count == k, let least = largest.least, logit <= least { continue }
        largest.push(logit)
        if largest.elements.count > k { _ = largest.pop() }
    }
    return largest.least ?? -.infinity
}

/// The smallest set of most likely candidates whose shares reach `topP` of the total, best first; at least one.
private func nucleus(_ candidates: [Candidate], _ topP: Double) -> [Candidate] {
    let total = candidates.reduce(0) { $0 + $1.share }
    // Tokens below this share can't be in the set: even all of them together are within the part left out. Sort the rest.
    let rare = (1 - topP) * total / Double(candidates.count)
    let common = candidates.filter { $0.share >= rare }
        .sorted { $0.share != $1.share ? $0.share > $1.share : $0.token < $1.token }
    var above = 0.0
    let kept = common.prefix { candidate in
        defer { above += candidate.share }
        return above < topP * total
    }
    return kept.isEmpty ? Array(common.prefix(1)) : Array(kept)
}
