import Foundation

/// How much two sets of logits differ: figures without a verdict, defined as in `gemma_runtime/proof/agreement.py`.
public struct Agreement: Equatable, Sendable {
    public let positions: Int
    public let top1: Double  // share of positions with the same most likely token
    public let nearTies: Int  // positions whose most likely token differs by less than the tie margin
    public let maxAbs: Double  // max |Δlogit| over the reference's top tokens
    public let meanAbs: Double
    public let meanKL: Double  // nats
    public let p99KL: Double
}

private let tieMargin = 0.5  // logits

/// Compares (T, V) logits with T positions of a golden.
func compareLogits(_ actual: [[Float]], _ expected: TopLogits) throws -> Agreement {
    let positions = try actual.indices.map { try comparePosition(actual[$0], expected, $0) }
    let count = Double(positions.count)
    return Agreement(
        positions: positions.count,
        top1: Double(positions.filter(\.same).count) / count,
        nearTies: positions.filter(\.nearTie).count,
        maxAbs: positions.map(\.maxAbs).max() ?? 0,
        meanAbs: positions.reduce(0) { $0 + $1.meanAbs } / count,
        meanKL: positions.reduce(0) { $0 + $1.kl } / count,
        p99KL: quantile(positions.map(\.kl), 0.99)
    )
}

/// The figures of several prompts as one: means weighted by positions, the largest p99 and maximum.
func pool(_ agreements: [Agreement]) -> Agreement {
    let positions = agreements.reduce(0) { $0 + $1.positions }
    func mean(_ value: (Agreement) -> Double) -> Double {
        agreements.reduce(0) { $0 + Double($1.positions) * value($1) } / Double(positions)
    }
    return Agreement(
        positions: positions,
        top1: mean(\.top1),
        nearTies: agreements.reduce(0) { $0 + $1.nearTies },
        maxAbs: agreements.map(\.maxAbs).max() ?? 0,
        meanAbs: mean(\.meanAbs),
        meanKL: mean(\.meanKL),
        p99KL: agreements.map(\.p99KL).max() ?? 0
    )
}

private struct Position {
    let same: Bool
    let nearTie: Bool
    let maxAbs: Double
    let meanAbs: Double
    let kl: Double
}

private func comparePosition(_ actual: [Float], _ expected: TopLogits, _ index: Int) throws -> Position {
    let ids = expected.ids[index]
    let reference = expected.logits[index]
    if let outside = ids.first(where: { $0 >= actual.count }) {
        throw GemmaError.bundle(
            "goldens.json has token \(outside), but the artifact's vocabulary has \(actual.count); export the model again"
        )
    }
    let measured = ids.map { Double(actual[$0]) }
    let top = actual.indices.reduce(0) { actual[$1] > actual[$0] ? $1 : $0 }
    let lead = reference[0] - (ids.firstIndex(of: top).map { reference[$0] } ?? -.infinity)
    let normalizer = logSumExp(actual)
    let deltas = zip(measured, reference).map { abs($0 - $1) }
    return Position(
        same: top == ids[0],
        nearTie: top != ids[0] && lead <= tieMargin,
        maxAbs: deltas.max() ?? 0,
        meanAbs: deltas.reduce(0, +) / Double(deltas.count),
        kl: bucketedKL(reference.map { $0 - expected.logSumExp[index] }, measured.map { $0 - normalizer })
    )
}

/// KL(expected ‖ actual) over the stored tokens and one bucket for all others.
private func bucketedKL(_ logP: [Double], _ logQ: [Double]) -> Double {
    let kl = zip(logP, logQ).reduce(0) { $0 + exp($1.0) * ($1.0 - $1.1) }
    let restP = max(0, 1 - logP.reduce(0) { $0 + exp($1) })
    let restQ = max(1e-12, 1 - logQ.reduce(0) { $0 + exp($1) })
    return restP > 0 ? kl + restP * log(restP / restQ) : kl
}
