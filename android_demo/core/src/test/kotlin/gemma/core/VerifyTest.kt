package gemma.core

import java.io.File
import java.util.Locale
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

class VerifyTest {
    private val goldens = loadGoldens(Bundle(TINY, Manifest.parse(readText(File(TINY, MANIFEST)))))

    /** A session that returns the goldens' logits, changed by `damage`. */
    private fun replaying(damage: (FloatArray) -> Unit = {}): Session {
        val rows = goldens.associate { golden ->
            golden.tokens.asList() to golden.quantized
        }
        return object : Session {
            override val scoresTogether = true

            override fun undoable(most: Int) = most

            private val tokens = ArrayList<Int>()
            override val position get() = tokens.size
            override val contextLength = 4096

            override fun prefill(tokens: IntArray, beforeChunk: () -> Unit): FloatArray = score(tokens).last()

            override fun decode(token: Int) = prefill(intArrayOf(token))

            override fun score(tokens: IntArray) = tokens.map { token ->
                this.tokens += token
                row(this.tokens).also(damage)
            }

            override fun rewind(to: Int): Int {
                tokens.subList(to, tokens.size).clear()
                return position
            }

            override fun reset() = tokens.clear()

            override fun close() = Unit

            private fun row(tokens: List<Int>): FloatArray {
                val (whole, top) = rows.entries.first { it.key.take(tokens.size) == tokens }
                val row = FloatArray(376) { -30f }
                val index = tokens.size - 1 - (whole.size - top.ids.size)
                if (index >= 0) top.ids[index].forEachIndexed { k, id -> row[id] = top.logits[index][k].toFloat() }
                return row
            }
        }
    }

    @Test
    fun `limits equal those of gemma-runtime verify`() {
        val limits = (parseJson(File(DATA, "phone_vectors.json").readText()).field("limits") as JsonObject).fields
        assertEquals(setOf("onnx", "executorch", "coreml"), limits.keys)
        limits.forEach { (target, expected) -> assertEquals(expected, limitsJson(Limits.of(target)), target) }
    }

    @Test
    fun `an exceeded limit fails with the message of gemma-runtime verify in every locale`() {
        val locale = Locale.getDefault()
        try {
            Locale.setDefault(Locale.GERMANY)
            val loose = Limits(maxMeanKl = 1e9)
            assertEquals(Verdict.PASS, verify(replaying(), goldens, loose).verdict)
            val exact = Agreement(10, 1.0, 0, 0.0, 0.0, 2.344e-6, 0.0)
            val verification = verify(replaying(), goldens, loose, exact)
            assertEquals(Verdict.FAIL, verification.verdict)
            assertEquals(listOf("mean KL of the float kernels is 2.34e-06, above 1e-06"), verification.failures)
            val impossible = verify(replaying(), goldens, loose.copy(minTop1 = 1.01))
            assertEquals(listOf("top-1 outside near ties is 100.0%, below 101%"), impossible.failures)
        } finally {
            Locale.setDefault(locale)
        }
    }

    @Test
    fun `a NaN and a different top token fail`() {
        val nan = verify(replaying { it[7] = Float.NaN }, goldens, Limits())
        assertEquals(Verdict.FAIL, nan.verdict)
        val other = verify(replaying { it[7] = 9f }, goldens, Limits(maxMeanKl = 1e9))
        assertTrue(other.failures.single().startsWith("top-1 outside near ties is "))
    }

    @Test
    fun `a stopped replay leaves the session empty`() {
        val session = replaying()
        assertFailsWith<IllegalStateException> { verify(session, goldens, Limits()) { error("stopped") } }
        assertEquals(0, session.position)
        val failing = replaying { error("the model failed") }
        assertFailsWith<IllegalStateException> { verify(failing, goldens, Limits()) }
        assertEquals(0, failing.position)
        var steps = 0
        assertFailsWith<IllegalStateException> {
            val tokens = ScriptedSession { 3 }
            try {
                measureSpeed(tokens, 400, Workload(listOf(4), 4, 8)) { if (++steps == 5) error("stopped") }
            } finally {
                assertEquals(0, tokens.position)
            }
        }
    }

    @Test
    fun `spans of sustained decoding are Python's, and a stopped run leaves the session empty`() {
        json(File(DATA, "sustained_vectors.json")).list { case ->
            var now = 0.0
            val pace = case.of("pace").list { step -> step.list { it.double() } }
            val inner = ScriptedSession { 3 }
            val session = object : Session by inner {
                override fun prefill(tokens: IntArray, beforeChunk: () -> Unit) = inner.prefill(tokens, beforeChunk).also { now += 0.5 }

                override fun decode(token: Int) = inner.decode(token).also { now += pace.last { it[0] <= now }[1] }
            }
            val seen = ArrayList<Span>()
            val sustained = measureSustained(
                session, 400, Workload(listOf(4), 6, 10), case.of("seconds").double() / 60,
                nanoTime = { Math.round(now * 1e9) }, condition = { Condition("light", now.toLong()) }, onSpan = seen::add,
            )
            val expected = case.of("spans").list { span -> span.list { it.double() } }
            assertEquals(expected.size, sustained.spans.size)
            assertEquals(seen, sustained.spans)
            for ((span, numbers) in sustained.spans.zip(expected)) {
                assertEquals(numbers[0], span.seconds, 1e-6)
                assertEquals(numbers[1], span.tokensPerSecond, 1e-6)
                assertEquals("light", span.condition.thermal)
            }
            assertEquals(case.of("new_tokens").count(), sustained.newTokens)
            assertEquals(expected.minOf { it[1] }, sustained.lowest, 1e-6)
            assertEquals(0, inner.position)
            assertFailsWith<IllegalStateException> {
                measureSustained(session, 400, Workload(listOf(4), 6, 10), condition = { Condition(null, null) }, onStep = { error("stopped") })
            }
            assertEquals(0, inner.position)
        }
    }

    @Test
    fun `speed follows the clock, with the figures of gemma-runtime bench`() {
        var now = 0L
        val inner = ScriptedSession { 3 }
        val session = object : Session by inner {
            override fun prefill(tokens: IntArray, beforeChunk: () -> Unit) = inner.prefill(tokens, beforeChunk).also { now += 1_000_000L * tokens.size }

            override fun decode(token: Int) = inner.decode(token).also { now += 20_000_000L }
        }
        val benchmark = measureSpeed(session, 400, Workload(listOf(4, 8), 4, 3), repeats = 2, nanoTime = { now })
        assertEquals(listOf(50.0, 50.0), benchmark.prompts.map { it.decodeTokensPerSecond?.median })
        val short = object : Session by session {
            override val contextLength = 10
        }
        val narrow = measureSpeed(short, 400, Workload(listOf(4, 8), 4, 3), repeats = 1, nanoTime = { now })
        assertEquals(listOf(50.0, null), narrow.prompts.map { it.decodeTokensPerSecond?.median })
        assertEquals(listOf(4, 8), benchmark.prompts.map { it.tokens })
        assertEquals(Spread(8.0, 8.0, 8.0), benchmark.prompts[1].firstTokenMs)
        assertEquals(1000.0, benchmark.prompts[0].tokensPerSecond.median, 1e-9)
        assertEquals(Spread(50.0, 50.0, 50.0), benchmark.decodeTokensPerSecond)
        assertEquals(20.0, benchmark.tokenP95Ms.high)
        val shown = "files checked in 7 ms, loaded in 1235 ms\n4 tokens: prefill 1000.0 tokens/s, first token after 4 ms, then 50.0 tokens/s\n" +
            "8 tokens: prefill 1000.0 tokens/s, first token after 8 ms, then 50.0 tokens/s\n95 of 100 new tokens within 20 ms\n"
        assertEquals(shown, speedText(Loading(7.0, 1234.6), benchmark))
        json(File(DATA, "phone_vectors.json")).of("workloads").list { case ->
            val expected = Workload(case.of("prompt_lengths").list { it.count() }, case.of("decode_prompt").count(), case.of("new_tokens").count())
            assertEquals(expected, Workload.of(case.of("context_length").count()))
        }
        assertEquals(Spread(2.5, 1.0, 4.0), Spread.of(listOf(4.0, 1.0, 2.0, 3.0)))
    }
}
