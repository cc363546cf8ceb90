package gemma.core

import java.io.File

/** A figure over all repeats. */
data class Spread(val median: Double, val low: Double, val high: Double) {
    companion object {
        fun of(values: List<Double>) = Spread(quantile(values, 0.5), values.minOf { it }, values.maxOf { it })
    }
}

data class PromptFigures(val tokens: Int, val firstTokenMs: Spread, val tokensPerSecond: Spread)

/** A bundle's speed on this device: the figures of `gemma-runtime bench` that one process can measure. */
data class Benchmark(
    val repeats: Int,
    val newTokens: Int,
    val prompts: List<PromptFigures>,
    val decodeTokensPerSecond: Spread,
    val tokenMs: Spread, // each repeat's median time of a new token
    val tokenP95Ms: Spread,
)

/** The tokens to run, as in `gemma_runtime/measure/bench.py`: the usual prompt lengths that fit the context. */
data class Workload(val promptLengths: List<Int>, val decodePrompt: Int, val newTokens: Int) {
    companion object {
        fun of(contextLength: Int, newTokens: Int = NEW_TOKENS): Workload {
            val fittingNewTokens = minOf(newTokens, maxOf(1, contextLength / 2))
            val decodePrompt = maxOf(1, minOf(DECODE_PROMPT, contextLength - fittingNewTokens))
            val lengths = PROMPT_LENGTHS.filter { it <= contextLength }
            return Workload(lengths.ifEmpty { listOf(contextLength) }, decodePrompt, fittingNewTokens)
        }

        private val PROMPT_LENGTHS = listOf(32, 128, 512)
        private const val DECODE_PROMPT = 128
        private const val NEW_TOKENS = 64
    }
}

/**
 * Times prompts and new tokens, after one untimed prompt of the longest length.
 *
 * Calls `onStep` between two runs of the model; if it throws, the session is left empty.
 */
fun measureSpeed(
    session: Session,
    vocabSize: Int,
    workload: Workload,
    repeats: Int = 3,
    nanoTime: () -> Long = System::nanoTime,
    onStep: () -> Unit = {},
): Benchmark = try {
    session.reset()
    session.prefill(someTokens(vocabSize, workload.promptLengths.last()), onStep)
    val runs = List(repeats) { Stopwatch(session, vocabSize, nanoTime, onStep).run(workload) }
    Benchmark(
        repeats = repeats,
        newTokens = workload.newTokens,
        prompts = workload.promptLengths.mapIndexed { index, length -> promptFigures(length, runs.map { it.prompts[index] }) },
        decodeTokensPerSecond = Spread.of(runs.map { 1000 * it.tokens.size / it.tokens.sum() }),
        tokenMs = Spread.of(runs.map { quantile(it.tokens, 0.5) }),
        tokenP95Ms = Spread.of(runs.map { quantile(it.tokens, 0.95) }),
    )
} finally {
    session.reset()
}

/** Peak resident memory of this process in bytes; null where the system doesn't report it. */
fun peakResidentBytes(): Long? = residentBytes("VmHWM:")

/** Resident memory of this process in bytes; null where the system doesn't report it. */
fun residentBytes(): Long? = residentBytes("VmRSS:")

private fun residentBytes(name: String): Long? {
    val status = File("/proc/self/status").takeIf { it.canRead() } ?: return null
    val line = status.readLines().firstOrNull { it.startsWith(name) } ?: return null
    return line.removePrefix(name).removeSuffix("kB").trim().toLongOrNull()?.times(1024)
}

private class PromptTime(val prefillMs: Double, val firstTokenMs: Double)

private class Run(val prompts: List<PromptTime>, val tokens: List<Double>)

private class Stopwatch(
    private val session: Session,
    private val vocabSize: Int,
    private val nanoTime: () -> Long,
    private val onStep: () -> Unit,
) {
    fun run(workload: Workload): Run {
        val prompts = workload.promptLengths.map { timePrompt(someTokens(vocabSize, it)) }
        session.reset()
        var token = bestToken(session.prefill(someTokens(vocabSize, workload.decodePrompt), onStep))
        val times = List(workload.newTokens) {
            onStep()
            val started = nanoTime()
            token = bestToken(session.decode(token))
            since(started)
        }
        return Run(prompts, times)
    }

    private fun timePrompt(tokens: IntArray): PromptTime {
        session.reset()
        val started = nanoTime()
        val logits = session.prefill(tokens, onStep)
        val prefillMs = since(started)
        bestToken(logits)
        return PromptTime(prefillMs, since(started))
    }

    private fun since(started: Long): Double = (nanoTime() - started) / 1e6
}

private fun promptFigures(length: Int, times: List<PromptTime>) = PromptFigures(
    tokens = length,
    firstTokenMs = Spread.of(times.map { it.firstTokenMs }),
    tokensPerSecond = Spread.of(times.map { 1000 * length / it.prefillMs }),
)

/** The same ids on every run; which ids they are doesn't affect speed. */
internal fun someTokens(vocabSize: Int, count: Int): IntArray = IntArray(count) { (it * 7919 + count) % vocabSize }
