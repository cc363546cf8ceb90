package gemma.core

/** How much two sets of logits differ: figures without a verdict, defined as in `gemma_runtime/proof/agreement.py`. */
data class Agreement(
    val positions: Int,
    val top1: Double, // share of positions with the same most likely token
    val nearTies: Int, // positions whose most likely token differs by less than the tie margin
    val maxAbs: Double, // max |Δlogit| over the reference's top tokens
    val meanAbs: Double,
    val meanKl: Double, // nats
    val p99Kl: Double,
)

const val TIE_MARGIN = 0.5 // logits

/** Compares (T, V) logits with T positions of a golden. */
fun compareLogits(actual: List<FloatArray>, expected: TopLogits): Agreement {
    val positions = actual.indices.map { comparePosition(actual[it], expected, it) }
    return Agreement(
        positions = positions.size,
        top1 = positions.count { it.same }.toDouble() / positions.size,
        nearTies = positions.count { it.nearTie },
        maxAbs = positions.maxOf { it.maxAbs },
        meanAbs = positions.sumOf { it.meanAbs } / positions.size,
        meanKl = positions.sumOf { it.kl } / positions.size,
        p99Kl = quantile(positions.map { it.kl }, 0.99),
    )
}

/** The figures of several prompts as one: means weighted by positions, the largest p99 and maximum. */
fun pool(agreements: List<Agreement>): Agreement {
    val positions = agreements.sumOf { it.positions }
    fun mean(value: (Agreement) -> Double): Double = agreements.sumOf { it.positions * value(it) } / positions
    return Agreement(
        positions = positions,
        top1 = mean { it.top1 },
        nearTies = agreements.sumOf { it.nearTies },
        maxAbs = agreements.maxOf { it.maxAbs },
        meanAbs = mean { it.meanAbs },
        meanKl = mean { it.meanKl },
        p99Kl = agreements.maxOf { it.p99Kl },
    )
}

private class Position(val same: Boolean, val nearTie: Boolean, val maxAbs: Double, val meanAbs: Double, val kl: Double)

private fun comparePosition(actual: FloatArray, expected: TopLogits, index: Int): Position {
    val ids = expected.ids[index]
    val reference = expected.logits[index]
    ids.firstOrNull { it >= actual.size }?.let {
        throw BundleException(
            "goldens.json has token $it, but the artifact's vocabulary has ${actual.size}; export the model again",
        )
    }
    val measured = DoubleArray(ids.size) { actual[ids[it]].toDouble() }
    val top = largest(actual)
    val lead = reference[0] - (ids.indexOf(top).takeIf { it >= 0 }?.let { reference[it] } ?: Double.NEGATIVE_INFINITY)
    val deltas = ids.indices.map { Math.abs(measured[it] - reference[it]) }
    return Position(
        same = top == ids[0],
        nearTie = top != ids[0] && lead <= TIE_MARGIN,
        maxAbs = deltas.maxOf { it },
        meanAbs = deltas.average(),
        kl = bucketedKl(reference, expected.logSumExp[index], measured, logSumExp(actual)),
    )
}

private fun largest(row: FloatArray): Int {
    var best = 0
    for (id in row.indices) if (row[id] > row[best]) best = id
    return best
}

/** KL(expected ‖ actual) over the stored tokens and one bucket for all others. */
private fun bucketedKl(reference: DoubleArray, referenceSum: Double, measured: DoubleArray, measuredSum: Double): Double {
    var kl = 0.0
    var p = 0.0
    var q = 0.0
    for (index in reference.indices) {
        val logP = reference[index] - referenceSum
        val logQ = measured[index] - measuredSum
        kl += Math.exp(logP) * (logP - logQ)
        p += Math.exp(logP)
        q += Math.exp(logQ)
    }
    val restP = maxOf(0.0, 1 - p)
    val restQ = maxOf(1e-12, 1 - q)
    return if (restP > 0) kl + restP * Math.log(restP / restQ) else kl
}
