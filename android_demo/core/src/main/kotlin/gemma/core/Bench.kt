package gemma.core

import java.io.File

/** A figure over all repeats. */
data class Spread(val median: Double, val low: Double, val high: Double) {
    companion object {
        fun of(values: List<Double>) = Spread(quantile(values, 0.5), values.minOf { it }, values.maxOf { it })
    }
}

data class PromptFigures(
    val tokens: Int,
    val firstTokenMs: Spread,
    val tokensPerSecond: Spread,
    val decodeTokensPerSecond: Spread?, // after the prompt; null if the context has no room for the new tokens
)

/** A bundle's speed on this device: the figures of `gemma-runtime bench` that one process can measure. */
data class Benchmark(
    val repeats: Int,
    val newTokens: Int,
    val prompts: List<PromptFigures>,
    val decodeTokensPerSecond: Spread,
    val tokenMs: Spread, // each repeat's median time of a new token
    val tokenP95Ms: Spread,
)

/**
 * The tokens to run, as in `gemma_runtime/measure/bench.py`: the usual prompt lengths that fit the context, and one that
 * leaves room to decode, after which the main figures of decoding are taken.
 */
data class Workload(val promptLengths: List<Int>, val decodePrompt: Int, val newTokens: Int) {
    companion object {
        fun of(contextLength: Int, newTokens: Int = NEW_TOKENS): Workload {
            val fittingNewTokens = minOf(newTokens, maxOf(1, contextLength / 2))
            val decodePrompt = maxOf(1, minOf(DECODE_PROMPT, contextLength - fittingNewTokens))
            val lengths = PROMPT_LENGTHS.filter { it <= contextLength } + decodePrompt
            return Workload(lengths.distinct().sorted(), decodePrompt, fittingNewTokens)
        }

        private val PROMPT_LENGTHS = listOf(32, 128, 512, 2048)
        private const val DECODE_PROMPT = 128
        private const val NEW_TOKENS = 64
    }
}

/**
 * Times prompts and the new tokens after each, after one untimed prompt of the longest length.
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
    val tokens = runs.map { run -> run[workload.promptLengths.indexOf(workload.decodePrompt)].tokens }
    Benchmark(
        repeats = repeats,
        newTokens = workload.newTokens,
        prompts = workload.promptLengths.mapIndexed { index, length -> promptFigures(length, runs.map { it[index] }) },
        decodeTokensPerSecond = Spread.of(tokens.map(::perSecond)),
        tokenMs = Spread.of(tokens.map { quantile(it, 0.5) }),
        tokenP95Ms = Spread.of(tokens.map { quantile(it, 0.95) }),
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

private class PromptTime(val prefillMs: Double, val firstTokenMs: Double, val tokens: List<Double>)

private class Stopwatch(
    private val session: Session,
    private val vocabSize: Int,
    private val nanoTime: () -> Long,
    private val onStep: () -> Unit,
) {
    fun run(workload: Workload): List<PromptTime> =
        workload.promptLengths.map { timePrompt(someTokens(vocabSize, it), workload.newTokens) }

    private fun timePrompt(prompt: IntArray, newTokens: Int): PromptTime {
        session.reset()
        val started = nanoTime()
        val logits = session.prefill(prompt, onStep)
        val prefillMs = since(started)
        val first = bestToken(logits)
        val firstTokenMs = since(started)
        val fits = prompt.size + newTokens <= session.contextLength
        return PromptTime(prefillMs, firstTokenMs, timeTokens(first, if (fits) newTokens else 0))
    }

    private fun timeTokens(first: Int, count: Int): List<Double> {
        var token = first
        return List(count) {
            onStep()
            val started = nanoTime()
            token = bestToken(session.decode(token))
            since(started)
        }
    }

    private fun since(started: Long): Double = (nanoTime() - started) / 1e6
}

private fun promptFigures(length: Int, times: List<PromptTime>) = PromptFigures(
    tokens = length,
    firstTokenMs = Spread.of(times.map { it.firstTokenMs }),
    tokensPerSecond = Spread.of(times.map { 1000 * length / it.prefillMs }),
    decodeTokensPerSecond = if (times.all { it.tokens.isEmpty() }) null else Spread.of(times.map { perSecond(it.tokens) }),
)

private fun perSecond(tokenMs: List<Double>): Double = 1000 * tokenMs.size / tokenMs.sum()

/** The same ids on every run; which ids they are doesn't affect speed. */
internal fun someTokens(vocabSize: Int, count: Int): IntArray = IntArray(count) { (it * 7919 + count) % vocabSize }
