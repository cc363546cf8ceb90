package gemma.core

import java.util.Locale

/** Waiting times of a user, in milliseconds; null where nothing was measured. */
data class Latency(
    val loadMs: Double?,
    val firstTokenMs: Double?, // from sending to the first token, prefill included
    val tokensPerSecond: Double?, // without the first token
    val tokenP95Ms: Double?,
    val tokens: Int,
)

/** Measures latency with a clock that returns nanoseconds. */
class LatencyMeter(private val nanoTime: () -> Long = System::nanoTime) {
    private var loadMs: Double? = null
    private var started = 0L
    private var last = 0L
    private var firstTokenMs: Double? = null
    private val gaps = ArrayList<Double>() // milliseconds between tokens

    fun <T> load(work: () -> T): T {
        val start = nanoTime()
        return work().also { loadMs = millis(start, nanoTime()) }
    }

    /** Call when a prompt is sent. */
    fun start() {
        started = nanoTime()
        firstTokenMs = null
        gaps.clear()
    }

    /** Call when a token is generated. */
    fun token() {
        val now = nanoTime()
        if (firstTokenMs == null) firstTokenMs = millis(started, now) else gaps += millis(last, now)
        last = now
    }

    fun latency() = Latency(
        loadMs = loadMs,
        firstTokenMs = firstTokenMs,
        tokensPerSecond = gaps.sum().takeIf { it > 0 }?.let { 1000 * gaps.size / it },
        tokenP95Ms = if (gaps.isEmpty()) null else quantile(gaps, 0.95),
        tokens = gaps.size + if (firstTokenMs == null) 0 else 1,
    )

    private fun millis(from: Long, to: Long): Double = (to - from) / 1e6
}

/** A quantile with linear interpolation, as in numpy. */
internal fun quantile(values: List<Double>, share: Double): Double {
    val sorted = values.sorted()
    val index = share * (sorted.size - 1)
    val below = index.toInt()
    val above = minOf(below + 1, sorted.lastIndex)
    return sorted[below] + (sorted[above] - sorted[below]) * (index - below)
}

/** Formats numbers the same in every locale; some locales have a decimal comma or other digits. */
internal fun formatInvariant(format: String, vararg numbers: Any?): String = String.format(Locale.ROOT, format, *numbers)
