package gemma.core

/** What the phone says of itself; null where it says nothing. */
data class Condition(val thermal: String?, val memoryBytes: Long?)

/** A few seconds of decoding. The time of prompts is not in its rate. */
data class Span(
    val seconds: Double, // from the start to its end
    val tokensPerSecond: Double,
    val condition: Condition, // at its end
)

/** How decoding speed holds up over minutes: the figures of `gemma-runtime bench --sustained`. */
data class Sustained(
    val minutes: Double,
    val roundTokens: Int, // new tokens of each round
    val promptTokens: Int, // of each round
    val newTokens: Int, // of all rounds
    val spans: List<Span>,
) {
    val first: Double get() = spans.first().tokensPerSecond
    val last: Double get() = spans.last().tokensPerSecond
    val lowest: Double get() = spans.minOf { it.tokensPerSecond }
}

/**
 * Decodes for some minutes, in rounds of a prompt and new tokens, so that every span sees the same lengths.
 *
 * The last span is left out if it is shorter than half of the others, unless it is the only one. Calls `onStep` between
 * two runs of the model; if it throws, the session is left empty.
 */
fun measureSustained(
    session: Session,
    vocabSize: Int,
    workload: Workload,
    minutes: Double = 10.0,
    nanoTime: () -> Long = System::nanoTime,
    condition: () -> Condition,
    onSpan: (Span) -> Unit = {},
    onStep: () -> Unit = {},
): Sustained = try {
    val prompt = someTokens(vocabSize, workload.decodePrompt)
    session.reset()
    session.prefill(prompt, onStep) // untimed: the first call is slower
    val spans = SpanMeter(nanoTime, condition, onSpan)
    var token = 0
    while (spans.elapsedNanos() < Math.round(minutes * 60e9)) {
        onStep()
        if (spans.total % workload.newTokens == 0) {
            session.reset()
            token = bestToken(session.prefill(prompt, onStep))
        }
        token = spans.token { bestToken(session.decode(token)) }
    }
    Sustained(minutes, workload.newTokens, workload.decodePrompt, spans.total, spans.end())
} finally {
    session.reset()
}

/** Cuts decoding into spans. */
private class SpanMeter(private val nanoTime: () -> Long, private val condition: () -> Condition, private val onSpan: (Span) -> Unit) {
    private val spans = ArrayList<Span>()
    private val started = nanoTime()
    private var now = started
    private var since = started
    private var tokens = 0
    private var decodingNanos = 0L
    var total = 0
        private set

    fun elapsedNanos(): Long {
        now = nanoTime()
        return now - started
    }

    fun token(decode: () -> Int): Int {
        val before = nanoTime()
        val token = decode()
        now = nanoTime()
        total++
        tokens++
        decodingNanos += now - before
        if (seconds(since, now) >= SPAN_SECONDS) {
            add()
            since = now
            tokens = 0
            decodingNanos = 0
        }
        return token
    }

    fun end(): List<Span> {
        if (tokens > 0 && (spans.isEmpty() || seconds(since, now) >= SPAN_SECONDS / 2)) add()
        return spans
    }

    private fun add() {
        spans += Span(seconds(started, now), 1e9 * tokens / decodingNanos, condition())
        onSpan(spans.last())
    }

    private fun seconds(from: Long, to: Long): Double = (to - from) / 1e9

    private companion object {
        const val SPAN_SECONDS = 5.0
    }
}
