import Foundation

public enum Verdict: String, Sendable {
    case pass = "PASS"
    case fail = "FAIL"
    case ambiguous = "AMBIGUOUS"
}

/// The largest differences that a lowering may have, as in `gemma-runtime verify`, whose source explains them.
public struct Limits: Equatable, Sendable {
    public let minTop1: Double  // near ties count as agreement
    public let maxMeanKL: Double  // of scoring, of decoding, and between the two
    public let maxExactKL: Double  // mean, with float activations
    public let maxNearTies: Double  // share of positions, above which PASS becomes AMBIGUOUS

    public init(
        minTop1: Double = 0.98, maxMeanKL: Double = 1e-2, maxExactKL: Double = 1e-6, maxNearTies: Double = 0.2
    ) {
        self.minTop1 = minTop1
        self.maxMeanKL = maxMeanKL
        self.maxExactKL = maxExactKL
        self.maxNearTies = maxNearTies
    }

    /// XNNPACK quantizes activations with one scale per token, which costs more; float16 costs little.
    public static func of(target: String) -> Limits {
        switch target {
        case "executorch": return Limits(maxMeanKL: 5e-2)
        case "coreml": return Limits(maxMeanKL: 5e-4)
        default: return Limits()
        }
    }
}

public struct Verification: Sendable {
    public let verdict: Verdict
    public let failures: [String]
    public let limits: Limits
    public let lowering: Agreement  // artifact against the reference with the same codes; `scored` and `decoded` pooled
    public let scored: Agreement  // whole prompts
    public let decoded: Agreement  // half a prompt in one call, the rest token by token
    public let exact: Agreement?  // lowering, by the golden's name with float activations, where the bundle has such a graph
    public let paths: Agreement  // decoded against scored logits
    public let quantization: Agreement  // artifact against the float32 reference
    public let byGolden: [(name: String, figures: Agreement)]  // lowering, by the golden's name
}

/// Replays a bundle's goldens on its exact graph, if it has one, and on its shipped graph, as
/// `gemma-runtime verify` does. Calls `onGolden` with the number of finished replays and of all replays.
public func verifyBundle(
    _ bundle: ModelBundle, _ session: BundleSession, isolation: isolated (any Actor)? = #isolation,
    onGolden: (Int, Int) -> Void = { _, _ in }
) async throws -> Verification {
    let goldens = try loadGoldens(bundle)
    let hasExact = bundle.manifest.graphs["exact"] != nil
    let all = hasExact ? 2 * goldens.count : goldens.count
    var exact: Agreement?
    if hasExact {
        exact = try await session.withGraph("exact") { other in
            try measureLowering(other, goldens) { onGolden($0, all) }
        }
    }
    let limits = Limits.of(target: bundle.manifest.target)
    return try verify(session, goldens, limits, exact) { onGolden(all - goldens.count + $0, all) }
}

/// How much a session differs from the reference with the same codes, by scoring and by decoding.
public func measureLowering(
    _ session: Session, _ goldens: [Golden], onGolden: (Int) -> Void = { _ in }
) throws -> Agreement {
    pool(try replayAll(session, goldens, onGolden).flatMap { [$0.scored, $0.decoded] })
}

/// Replays every golden by scoring and by prefill and decode, and judges the lowering.
///
/// `exact` is the result of `measureLowering` with float activations, which has a stricter limit.
/// Calls `onGolden` with the number of finished goldens. Cancelling the task stops it between two goldens.
public func verify(
    _ session: Session, _ goldens: [Golden], _ limits: Limits, _ exact: Agreement? = nil,
    onGolden: (Int) -> Void = { _ in }
) throws -> Verification {
    let replays = try replayAll(session, goldens, onGolden)
    let scored = pool(replays.map(\.scored))
    let decoded = pool(replays.map(\.decoded))
    let lowering = pool([scored, decoded])
    let paths = pool(replays.map(\.paths))
    let failures = [
        top1Failure(lowering, limits),
        klFailure("scoring", scored, limits.maxMeanKL),
        klFailure("decoding", decoded, limits.maxMeanKL),
        klFailure("decoding against scoring", paths, limits.maxMeanKL),
        exact.flatMap { klFailure("the float kernels", $0, limits.maxExactKL) },
    ].compactMap { $0 }
    return Verification(
        verdict: verdict(lowering, failures, limits),
        failures: failures,
        limits: limits,
        lowering: lowering,
        scored: scored,
        decoded: decoded,
        exact: exact,
        paths: paths,
        quantization: pool(replays.map(\.quantization)),
        byGolden: zip(goldens, replays).map { ($0.name, pool([$1.scored, $1.decoded])) }
    )
}

private struct Replay {
    let scored: Agreement
    let decoded: Agreement
    let paths: Agreement
    let quantization: Agreement
}

private func replayAll(_ session: Session, _ goldens: [Golden], _ onGolden: (Int) -> Void) throws -> [Replay] {
    try goldens.enumerated().map { index, golden in
        try Task.checkCancellation()
        defer { onGolden(index + 1) }
        return try replay(session, golden)
    }
}

/// Leaves the session empty, even on failure, so that no conversation mistakes the cached tokens for its own.
private func replay(_ session: Session, _ golden: Golden) throws -> Replay {
    let start = golden.tokens.count - golden.judged
    let half = start + max(1, golden.judged / 2)
    session.reset()
    defer { session.reset() }
    let decoded = try [session.prefill(Array(golden.tokens[..<half]))] + golden.tokens[half...].map(session.decode)
    session.reset()
    if start > 0 { _ = try session.prefill(Array(golden.tokens[..<start])) }
    let scored = try session.score(Array(golden.tokens[start...]))
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
    return String(format: "top-1 outside near ties is %.1f%%, below %.0f%%", 100 * agreed, 100 * limits.minTop1)
}

private func klFailure(_ what: String, _ figures: Agreement, _ limit: Double) -> String? {
    if figures.meanKL <= limit { return nil }  // false for NaN, which fails
    return "mean KL of \(what) is " + String(format: "%.2e, above %.0e", figures.meanKL, limit)
}
