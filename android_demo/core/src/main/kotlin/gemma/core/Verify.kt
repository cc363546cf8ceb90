package gemma.core

enum class Verdict { PASS, FAIL, AMBIGUOUS }

/** The largest differences that a lowering may have, as in `gemma-runtime verify`, whose source explains them. */
data class Limits(
    val minTop1: Double = 0.98, // near ties count as agreement
    val maxMeanKl: Double = 1e-2, // of scoring, of decoding, and between the two
    val maxExactKl: Double = 1e-6, // mean, with float activations
    val maxNearTies: Double = 0.2, // share of positions, above which PASS becomes AMBIGUOUS
) {
    companion object {
        /** XNNPACK quantizes activations with one scale per token, which costs more; float16 costs little. */
        fun of(target: String, cacheDtype: String = "float32") = when (target) {
            "executorch" -> Limits(maxMeanKl = 5e-2)
            "coreml" -> Limits(maxMeanKl = 5e-4)
            else -> if (cacheDtype == "int8") Limits(maxExactKl = 1e-3) else Limits()
        }
    }
}

data class Verification(
    val verdict: Verdict,
    val failures: List<String>,
    val limits: Limits,
    val lowering: Agreement, // artifact against the reference with the same codes; `scored` and `decoded` pooled
    val scored: Agreement, // whole prompts
    val decoded: Agreement, // half a prompt in one call, the rest token by token
    val exact: Agreement?, // lowering with float activations, where the bundle has such a graph
    val paths: Agreement, // decoded against scored logits
    val quantization: Agreement, // artifact against the float32 reference
    val byGolden: Map<String, Agreement>, // lowering, by the golden's name
)

/**
 * Replays a bundle's goldens on its exact graph, if it has one, and on its shipped graph, as
 * `gemma-runtime verify` does. Calls `onGolden` with the number of finished replays and of all replays, and `onStep`
 * between two runs of the model.
 */
fun verifyBundle(
    bundle: Bundle,
    session: BundleSession,
    onStep: () -> Unit = {},
    onGolden: (Int, Int) -> Unit = { _, _ -> },
): Verification {
    val goldens = loadGoldens(bundle)
    val hasExact = EXACT in bundle.manifest.graphs
    val all = if (hasExact) 2 * goldens.size else goldens.size
    val exact = if (hasExact) {
        session.withGraph(EXACT) { other -> measureLowering(other, goldens, onStep) { onGolden(it, all) } }
    } else {
        null
    }
    val finished = all - goldens.size
    val limits = Limits.of(bundle.manifest.target.name, bundle.manifest.cacheDtype)
    return verify(session, goldens, limits, exact, onStep) { onGolden(finished + it, all) }
}

/** How much a session differs from the reference with the same codes, by scoring and by decoding. */
fun measureLowering(
    session: Session,
    goldens: List<Golden>,
    onStep: () -> Unit = {},
    onGolden: (Int) -> Unit = {},
): Agreement = pool(replayAll(session, goldens, onStep, onGolden).flatMap { listOf(it.scored, it.decoded) })

/**
 * Replays every golden by scoring and by prefill and decode, and judges the lowering.
 *
 * `exact` is the result of `measureLowering` with float activations, which has a stricter limit.
 * Calls `onGolden` with the number of finished goldens, and `onStep` between two runs of the model; if they throw,
 * the session is left empty.
 */
fun verify(
    session: Session,
    goldens: List<Golden>,
    limits: Limits,
    exact: Agreement? = null,
    onStep: () -> Unit = {},
    onGolden: (Int) -> Unit = {},
): Verification {
    val replays = replayAll(session, goldens, onStep, onGolden)
    val scored = pool(replays.map { it.scored })
    val decoded = pool(replays.map { it.decoded })
    val lowering = pool(listOf(scored, decoded))
    val paths = pool(replays.map { it.paths })
    val failures = listOfNotNull(
        top1Failure(lowering, limits),
        klFailure("scoring", scored, limits.maxMeanKl),
        klFailure("decoding", decoded, limits.maxMeanKl),
        klFailure("decoding against scoring", paths, limits.maxMeanKl),
        exact?.let { klFailure("the float kernels", it, limits.maxExactKl) },
    )
    return Verification(
        verdict = verdict(lowering, failures, limits),
        failures = failures,
        limits = limits,
        lowering = lowering,
        scored = scored,
        decoded = decoded,
        exact = exact,
        paths = paths,
        quantization = pool(replays.map { it.quantization }),
        byGolden = goldens.zip(replays).associate { (golden, it) -> golden.name to pool(listOf(it.scored, it.decoded)) },
    )
}

private const val EXACT = "exact"

private class Replay(val scored: Agreement, val decoded: Agreement, val paths: Agreement, val quantization: Agreement)

private fun replayAll(session: Session, goldens: List<Golden>, onStep: () -> Unit, onGolden: (Int) -> Unit): List<Replay> =
    goldens.mapIndexed { index, golden -> replay(session, golden, onStep).also { onGolden(index + 1) } }

/** Leaves the session empty, even on failure, so that no conversation mistakes the cached tokens for its own. */
private fun replay(session: Session, golden: Golden, onStep: () -> Unit): Replay = try {
    val start = golden.tokens.size - golden.judged
    val half = start + maxOf(1, golden.judged / 2)
    session.reset()
    val decoded = listOf(session.prefill(golden.tokens.copyOf(half), onStep)) +
        golden.tokens.drop(half).map {
            onStep()
            session.decode(it)
        }
    session.reset()
    if (start > 0) session.prefill(golden.tokens.copyOf(start), onStep)
    val scored = session.score(golden.tokens.copyOfRange(start, golden.tokens.size))
    compare(golden, scored, decoded)
} finally {
    session.reset()
}

private fun compare(golden: Golden, scored: List<FloatArray>, decoded: List<FloatArray>): Replay {
    val tail = scored.size - decoded.size
    return Replay(
        scored = compareLogits(scored, golden.quantized),
        decoded = compareLogits(decoded, golden.quantized.from(tail)),
        paths = compareLogits(decoded, topLogits(scored.drop(tail))),
        quantization = pool(
            listOf(compareLogits(scored, golden.reference), compareLogits(decoded, golden.reference.from(tail))),
        ),
    )
}

private fun verdict(lowering: Agreement, failures: List<String>, limits: Limits): Verdict = when {
    failures.isNotEmpty() -> Verdict.FAIL
    lowering.nearTies > limits.maxNearTies * lowering.positions -> Verdict.AMBIGUOUS
    else -> Verdict.PASS
}

private fun top1Failure(lowering: Agreement, limits: Limits): String? {
    val agreed = lowering.top1 + lowering.nearTies.toDouble() / lowering.positions
    if (agreed >= limits.minTop1) return null
    return formatInvariant("top-1 outside near ties is %.1f%%, below %.0f%%", 100 * agreed, 100 * limits.minTop1)
}

private fun klFailure(what: String, figures: Agreement, limit: Double): String? {
    if (figures.meanKl <= limit) return null // false for NaN, which fails
    return formatInvariant("mean KL of $what is %.2e, above %.0e", figures.meanKl, limit)
}
