package gemma.core

import java.util.Locale

/** What a user waited for. Milliseconds; null where nothing was measured. */
data class Latency(
    val loadMillis: Double?,
    val firstTokenMillis: Double?, // from the send to the first token, prefill included
    val tokensPerSecond: Double?, // of the tokens after the first
    val tokenP95Millis: Double?,
    val tokens: Int,
)

/** Measures with a clock that counts nanoseconds. */
class LatencyMeter(private val nanoTime: () -> Long = System::nanoTime) {
    private var loadMillis: Double? = null
    private var started = 0L
    private var last = 0L
    private var firstTokenMillis: Double? = null
    private val gaps = ArrayList<Double>() // milliseconds between tokens

    fun <T> load(work: () -> T): T {
        val start = nanoTime()
        return work().also { loadMillis = millis(start, nanoTime()) }
    }

    /** A prompt is sent. */
    fun start() {
        started = nanoTime()
        firstTokenMillis = null
        gaps.clear()
    }

    /** A token came. */
    fun token() {
        val now = nanoTime()
        if (firstTokenMillis == null) firstTokenMillis = millis(started, now) else gaps += millis(last, now)
        last = now
    }

    fun latency() = Latency(
        loadMillis = loadMillis,
        firstTokenMillis = firstTokenMillis,
        tokensPerSecond = gaps.sum().takeIf { it > 0 }?.let { 1000 * gaps.size / it },
        tokenP95Millis = if (gaps.isEmpty()) null else quantile(gaps, 0.95),
        tokens = gaps.size + if (firstTokenMillis == null) 0 else 1,
    )

    private fun millis(from: Long, to: Long): Double = (to - from) / 1e6
}

/** A quantile with linear interpolation, as numpy's. */
internal fun quantile(values: List<Double>, share: Double): Double {
    val sorted = values.sorted()
    val place = share * (sorted.size - 1)
    val below = place.toInt()
    val above = minOf(below + 1, sorted.lastIndex)
    return sorted[below] + (sorted[above] - sorted[below]) * (place - below)
}

/** Numbers written the same everywhere: a phone's own language may have a comma, or other digits. */
internal fun plain(format: String, vararg numbers: Any?): String = String.format(Locale.ROOT, format, *numbers)
