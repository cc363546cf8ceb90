package gemma.core

/** How long checking and loading a bundle took. */
data class Loading(val checkMs: Double, val loadMs: Double)

/**
 * The device and its results as JSON, which `gemma-runtime report` reads, with the names of `verify --json`, `bench --json`
 * and `bench --sustained --json`. What was not measured is null.
 */
fun reportJson(
    device: Map<String, String>,
    bundle: Bundle,
    verification: Verification?,
    loading: Loading,
    benchmark: Benchmark?,
    sustained: Sustained?,
    threads: Int?,
): Json = JsonObject(
    mapOf(
        "device" to JsonObject(device.mapValues { JsonString(it.value) }),
        "bundle" to JsonString(bundle.directory.name),
        "digest" to JsonString(bundle.digest()),
        "codes_digest" to JsonString(bundle.manifest.quantization.codesDigest),
        "verify" to (verification?.let(::verificationJson) ?: JsonNull),
        "bench" to (benchmark?.let { benchmarkJson(bundle, loading, it, threads) } ?: JsonNull),
        "sustained" to (sustained?.let(::sustainedJson) ?: JsonNull),
    ),
)

private fun benchmarkJson(bundle: Bundle, loading: Loading, benchmark: Benchmark, threads: Int?) = JsonObject(
    mapOf(
        "threads" to (threads?.let(::number) ?: JsonNull),
        "repeats" to number(benchmark.repeats),
        "new_tokens" to number(benchmark.newTokens),
        "bundles" to JsonArray(listOf(benchJson(bundle, loading, benchmark))),
    ),
)

private fun sustainedJson(sustained: Sustained) = JsonObject(
    mapOf(
        "sustained_minutes" to JsonNumber(sustained.minutes),
        "round_tokens" to number(sustained.roundTokens),
        "prompt_tokens" to number(sustained.promptTokens),
        "new_tokens" to number(sustained.newTokens),
        "first" to JsonNumber(sustained.first),
        "last" to JsonNumber(sustained.last),
        "lowest" to JsonNumber(sustained.lowest),
        "spans" to JsonArray(sustained.spans.map(::spanJson)),
    ),
)

private fun spanJson(span: Span) = JsonObject(
    mapOf(
        "seconds" to JsonNumber(span.seconds),
        "tokens_per_second" to JsonNumber(span.tokensPerSecond),
        "thermal" to (span.condition.thermal?.let(::JsonString) ?: JsonNull),
        "memory_bytes" to (span.condition.memoryBytes?.let(::number) ?: JsonNull),
    ),
)

private fun verificationJson(verification: Verification) = JsonObject(
    mapOf(
        "verdict" to JsonString(verification.verdict.name),
        "failures" to JsonArray(verification.failures.map(::JsonString)),
        "limits" to limitsJson(verification.limits),
        "lowering" to agreementJson(verification.lowering),
        "scored" to agreementJson(verification.scored),
        "decoded" to agreementJson(verification.decoded),
        "exact" to (verification.exact?.let(::agreementJson) ?: JsonNull),
        "engines" to JsonNull, // phones have no second engine for the same artifact
        "paths" to agreementJson(verification.paths),
        "quantization" to agreementJson(verification.quantization),
        "by_golden" to JsonObject(verification.byGolden.mapValues { agreementJson(it.value) }),
    ),
)

internal fun limitsJson(limits: Limits) = JsonObject(
    mapOf(
        "min_top1" to JsonNumber(limits.minTop1),
        "max_mean_kl" to JsonNumber(limits.maxMeanKl),
        "max_exact_kl" to JsonNumber(limits.maxExactKl),
        "max_near_ties" to JsonNumber(limits.maxNearTies),
    ),
)

private fun agreementJson(figures: Agreement) = JsonObject(
    mapOf(
        "positions" to number(figures.positions),
        "top1" to JsonNumber(figures.top1),
        "near_ties" to number(figures.nearTies),
        "max_abs" to JsonNumber(figures.maxAbs),
        "mean_abs" to JsonNumber(figures.meanAbs),
        "mean_kl" to JsonNumber(figures.meanKl),
        "p99_kl" to JsonNumber(figures.p99Kl),
    ),
)

private fun benchJson(bundle: Bundle, loading: Loading, benchmark: Benchmark): Json {
    val manifest = bundle.manifest
    return JsonObject(
        mapOf(
            "bundle" to JsonString(bundle.directory.name),
            "model" to JsonString(manifest.model.id),
            "recipe" to JsonString(manifest.quantization.recipe),
            "target" to JsonString(manifest.target.name),
            "artifact_bytes" to number(manifest.artifactBytes),
            "cache_bytes" to JsonObject(AttentionKind.entries.associate { it.name.lowercase() to JsonNumber(manifest.cacheBytes(it)) }),
            "check_ms" to once(loading.checkMs),
            "load_ms" to once(loading.loadMs),
            "prompts" to JsonArray(benchmark.prompts.map(::promptJson)),
            "decode_tokens_per_second" to spreadJson(benchmark.decodeTokensPerSecond),
            "token_ms" to spreadJson(benchmark.tokenMs),
            "token_p95_ms" to spreadJson(benchmark.tokenP95Ms),
            "peak_rss_bytes" to (peakResidentBytes()?.let { once(it.toDouble()) } ?: JsonNull),
        ),
    )
}

private fun promptJson(figures: PromptFigures) = JsonObject(
    mapOf(
        "tokens" to number(figures.tokens),
        "first_token_ms" to spreadJson(figures.firstTokenMs),
        "tokens_per_second" to spreadJson(figures.tokensPerSecond),
        "decode_tokens_per_second" to (figures.decodeTokensPerSecond?.let(::spreadJson) ?: JsonNull),
    ),
)

private fun spreadJson(spread: Spread) = JsonObject(
    mapOf("median" to JsonNumber(spread.median), "low" to JsonNumber(spread.low), "high" to JsonNumber(spread.high)),
)

private fun once(value: Double): Json = spreadJson(Spread(value, value, value))

private fun number(value: Int): Json = JsonNumber(value.toDouble())

private fun number(value: Long): Json = JsonNumber(value.toDouble())
