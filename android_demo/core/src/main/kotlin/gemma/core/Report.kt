package gemma.core

/** The device and what was measured on it, as JSON to share. */
fun reportJson(device: Map<String, String>, manifest: Manifest, verification: Verification, latency: Latency): Json =
    JsonObject(
        mapOf(
            "device" to JsonObject(device.mapValues { JsonString(it.value) }),
            "model" to JsonString(manifest.model.id),
            "target" to JsonString(manifest.target.name),
            "recipe" to JsonString(manifest.quantization.recipe),
            "codes_digest" to JsonString(manifest.quantization.codesDigest),
            "verification" to verificationJson(verification),
            "latency" to latencyJson(latency),
        ),
    )

private fun verificationJson(found: Verification) = JsonObject(
    mapOf(
        "verdict" to JsonString(found.verdict.name),
        "failures" to JsonArray(found.failures.map(::JsonString)),
        "lowering" to agreementJson(found.lowering),
        "scored" to agreementJson(found.scored),
        "decoded" to agreementJson(found.decoded),
        "paths" to agreementJson(found.paths),
        "quantization" to agreementJson(found.quantization),
    ),
)

private fun agreementJson(figures: Agreement) = JsonObject(
    mapOf(
        "positions" to JsonNumber(figures.positions.toDouble()),
        "top1" to JsonNumber(figures.top1),
        "near_ties" to JsonNumber(figures.nearTies.toDouble()),
        "max_abs" to JsonNumber(figures.maxAbs),
        "mean_abs" to JsonNumber(figures.meanAbs),
        "mean_kl" to JsonNumber(figures.meanKl),
        "p99_kl" to JsonNumber(figures.p99Kl),
    ),
)

private fun latencyJson(latency: Latency) = JsonObject(
    mapOf(
        "load_ms" to number(latency.loadMillis),
        "first_token_ms" to number(latency.firstTokenMillis),
        "tokens_per_second" to number(latency.tokensPerSecond),
        "token_p95_ms" to number(latency.tokenP95Millis),
        "tokens" to JsonNumber(latency.tokens.toDouble()),
    ),
)

private fun number(value: Double?): Json = value?.let(::JsonNumber) ?: JsonNull
