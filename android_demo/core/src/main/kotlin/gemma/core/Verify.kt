package gemma.core

enum class Verdict { PASS, FAIL, AMBIGUOUS }

/** What the lowering may cost; the figures are those of `gemma-runtime verify`. */
data class Limits(
    val minTop1: Double = 0.98, // near ties not counted against it
    val maxMeanKl: Double = 1e-2,
    val maxNearTies: Double = 0.2, // share of positions, above which PASS becomes AMBIGUOUS
) {
    companion object {
        /** XNNPACK rounds activations with one scale for a whole token, which costs more. */
        fun of(target: String) = if (target == "executorch") Limits(maxMeanKl = 5e-2) else Limits()
    }
}

data class Verification(
    val verdict: Verdict,
    val failures: List<String>,
    val lowering: Agreement, // artifact against the reference with the same codes; all that follows
    val scored: Agreement, // whole prompts
    val decoded: Agreement, // half a prompt in one call, the rest token by token
    val paths: Agreement, // decoded against scored
    val quantization: Agreement, // artifact against the float32 reference
)

/** Replays every golden by scoring, and by prefill and decode; `onGolden` hears how many are done. */
fun verify(session: Session, goldens: List<Golden>, limits: Limits, onGolden: (Int) -> Unit = {}): Verification {
    val replays = goldens.mapIndexed { place, golden -> replay(session, golden).also { onGolden(place + 1) } }
    val scored = pool(replays.map { it.scored })
    val decoded = pool(replays.map { it.decoded })
    val lowering = pool(listOf(scored, decoded))
    val paths = pool(replays.map { it.paths })
    val failures = listOfNotNull(
        top1Failure(lowering, limits),
        klFailure("scoring", scored, limits),
        klFailure("decoding", decoded, limits),
        klFailure("decoding against scoring", paths, limits),
    )
    return Verification(
        verdict = when {
            failures.isNotEmpty() -> Verdict.FAIL
            lowering.nearTies > limits.maxNearTies * lowering.positions -> Verdict.AMBIGUOUS
            else -> Verdict.PASS
        },
        failures = failures,
        lowering = lowering,
        scored = scored,
        decoded = decoded,
        paths = paths,
        quantization = pool(replays.map { it.quantization }),
    )
}

private class Replay(val scored: Agreement, val decoded: Agreement, val paths: Agreement, val quantization: Agreement)

private fun replay(session: Session, golden: Golden): Replay {
    val start = golden.tokens.size - golden.judged
    val half = start + maxOf(1, golden.judged / 2)
    session.reset()
    val decoded = listOf(session.prefill(golden.tokens.copyOf(half))) +
        golden.tokens.drop(half).map { session.decode(it) }
    session.reset()
    if (start > 0) session.prefill(golden.tokens.copyOf(start))
    val scored = session.score(golden.tokens.copyOfRange(start, golden.tokens.size))
    session.reset()
    return compare(golden, scored, decoded)
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

private fun top1Failure(lowering: Agreement, limits: Limits): String? {
    val agreed = lowering.top1 + lowering.nearTies.toDouble() / lowering.positions
    if (agreed >= limits.minTop1) return null
    return "top-1 outside near ties is %.1f %%, below %.0f %%".format(100 * agreed, 100 * limits.minTop1)
}

private fun klFailure(what: String, figures: Agreement, limits: Limits): String? {
    if (figures.meanKl <= limits.maxMeanKl) return null // a NaN is not
    return "mean KL of $what is %.2e, above %.0e".format(figures.meanKl, limits.maxMeanKl)
}
