import Foundation

public enum Verdict: String {
    case pass = "PASS"
    case fail = "FAIL"
    case ambiguous = "AMBIGUOUS"
}

/// What the lowering may cost; the figures are those of `gemma-runtime verify`.
public struct Limits {
    public let minTop1: Double  // near ties not counted against it
    public let maxMeanKL: Double
    public let maxNearTies: Double  // share of positions, above which PASS becomes AMBIGUOUS

    public init(minTop1: Double = 0.98, maxMeanKL: Double = 1e-2, maxNearTies: Double = 0.2) {
        self.minTop1 = minTop1
        self.maxMeanKL = maxMeanKL
        self.maxNearTies = maxNearTies
    }

    /// XNNPACK rounds activations with one scale for a whole token, which costs more.
    public static func of(target: String) -> Limits {
        target == "executorch" ? Limits(maxMeanKL: 5e-2) : Limits()
    }
}

public struct Verification {
    public let verdict: Verdict
    public let failures: [String]
    public let lowering: Agreement  // artifact against the reference with the same codes; all that follows
    public let scored: Agreement  // whole prompts
    public let decoded: Agreement  // half a prompt in one call, the rest token by token
    public let paths: Agreement  // decoded against scored
    public let quantization: Agreement  // artifact against the float32 reference
}

/// Replays every golden by scoring, and by prefill and decode; `onGolden` hears how many are done.
///
/// Cancelling the task ends it between two goldens.
public func verify(
    _ session: Session, _ goldens: [Golden], _ limits: Limits, onGolden: (Int) -> Void = { _ in }
) throws -> Verification {
    let replays = try goldens.enumerated().map { place, golden -> Replay in
        try Task.checkCancellation()
        defer { onGolden(place + 1) }
        return try replay(session, golden)
    }
    let scored = pool(replays.map(\.scored))
    let decoded = pool(replays.map(\.decoded))
    let lowering = pool([scored, decoded])
    let paths = pool(replays.map(\.paths))
    let failures = [
        top1Failure(lowering, limits),
        klFailure("scoring", scored, limits),
        klFailure("decoding", decoded, limits),
        klFailure("decoding against scoring", paths, limits),
    ].compactMap { $0 }
    return Verification(
        verdict: verdict(lowering, failures, limits),
        failures: failures,
        lowering: lowering,
        scored: scored,
        decoded: decoded,
        paths: paths,
        quantization: pool(replays.map(\.quantization))
    )
}

private struct Replay {
    let scored: Agreement
    let decoded: Agreement
    let paths: Agreement
    let quantization: Agreement
}

private func replay(_ session: Session, _ golden: Golden) throws -> Replay {
    let start = golden.tokens.count - golden.judged
    let half = start + max(1, golden.judged / 2)
    session.reset()
    let decoded = try [session.prefill(Array(golden.tokens[..<half]))] + golden.tokens[half...].map(session.decode)
    session.reset()
    if start > 0 { _ = try session.prefill(Array(golden.tokens[..<start])) }
    let scored = try session.score(Array(golden.tokens[start...]))
    session.reset()
    return try compare(golden, scored, decoded)
}

private func compare(_ golden: Golden, _ scored: [[Float]], _ decoded: [[Float]]) throws -> Replay {
    let tail = scored.count - decoded.count
    return Replay(
        scored: try compareLogits(scored, golden.quantized),
        decoded: try compareLogits(decoded, golden.quantized.from(tail)),
        paths: try compareLogits(decoded, topLogits(Array(scored[tail...]))),
        quantization: pool([
            try compareLogits(scored, golden.reference),
            try compareLogits(decoded, golden.reference.from(tail)),
        ])
    )
}

private func verdict(_ lowering: Agreement, _ failures: [String], _ limits: Limits) -> Verdict {
    if !failures.isEmpty { return .fail }
    return Double(lowering.nearTies) > limits.maxNearTies * Double(lowering.positions) ? .ambiguous : .pass
}

private func top1Failure(_ lowering: Agreement, _ limits: Limits) -> String? {
    let agreed = lowering.top1 + Double(lowering.nearTies) / Double(lowering.positions)
    if agreed >= limits.minTop1 { return nil }
    return String(format: "top-1 outside near ties is %.1f %%, below %.0f %%", 100 * agreed, 100 * limits.minTop1)
}

private func klFailure(_ what: String, _ figures: Agreement, _ limits: Limits) -> String? {
    if figures.meanKL <= limits.maxMeanKL { return nil }  // a NaN is not
    return "mean KL of \(what) is " + String(format: "%.2e, above %.0e", figures.meanKL, limits.maxMeanKL)
}
