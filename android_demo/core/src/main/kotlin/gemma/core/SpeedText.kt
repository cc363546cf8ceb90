package gemma.core

/** A bundle's speed on this device, as the benchmark's screen shows it. */
fun speedText(loading: Loading, benchmark: Benchmark): String = buildString {
    append(formatInvariant("files checked in %.0f ms, loaded in %.0f ms\n", loading.checkMs, loading.loadMs))
    for (prompt in benchmark.prompts) {
        val rate = prompt.tokensPerSecond.median
        append(formatInvariant("%d tokens: prefill %.1f tokens/s, first token after %.0f ms", prompt.tokens, rate, prompt.firstTokenMs.median))
        prompt.decodeTokensPerSecond?.let { append(formatInvariant(", then %.1f tokens/s", it.median)) }
        append('\n')
    }
    append(formatInvariant("95 of 100 new tokens within %.0f ms\n", benchmark.tokenP95Ms.median))
}
