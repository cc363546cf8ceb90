package gemma.core

import java.io.File
import java.util.Locale
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

class VerifyTest {
    private val goldens = loadGoldens(Bundle(TINY, Manifest.parse(readText(File(TINY, MANIFEST)))))

    /** Says at each position what the golden's reference says, or what `damage` makes of it. */
    private fun replaying(damage: (FloatArray) -> Unit = {}): Session {
        val rows = goldens.associate { golden ->
            golden.tokens.asList() to golden.quantized
        }
        return object : Session {
            private val tokens = ArrayList<Int>()
            override val position get() = tokens.size
            override val contextLength = 4096

            override fun prefill(tokens: IntArray): FloatArray = score(tokens).last()

            override fun decode(token: Int) = prefill(intArrayOf(token))

            override fun score(tokens: IntArray) = tokens.map { token ->
                this.tokens += token
                said(this.tokens).also(damage)
            }

            override fun reset() = tokens.clear()

            override fun close() = Unit

            private fun said(tokens: List<Int>): FloatArray {
                val (whole, top) = rows.entries.first { it.key.take(tokens.size) == tokens }
                val row = FloatArray(376) { -30f }
                val place = tokens.size - 1 - (whole.size - top.ids.size)
                if (place >= 0) top.ids[place].forEachIndexed { k, id -> row[id] = top.logits[place][k].toFloat() }
                return row
            }
        }
    }

    @Test
    fun `limits are those of gemma-runtime verify`() {
        val limits = (parseJson(File(DATA, "phone_vectors.json").readText()).field("limits") as JsonObject).fields
        assertEquals(setOf("onnx", "executorch", "coreml"), limits.keys)
        limits.forEach { (target, said) -> assertEquals(said, limitsJson(Limits.of(target)), target) }
    }

    @Test
    fun `a broken limit fails in the words of gemma-runtime verify, in every language`() {
        val spoken = Locale.getDefault()
        try {
            Locale.setDefault(Locale.GERMANY)
            val fine = Limits(maxMeanKl = 1e9)
            assertEquals(Verdict.PASS, verify(replaying(), goldens, fine).verdict)
            val exact = Agreement(10, 1.0, 0, 0.0, 0.0, 2.344e-6, 0.0)
            val found = verify(replaying(), goldens, fine, exact)
            assertEquals(Verdict.FAIL, found.verdict)
            assertEquals(listOf("mean KL of the float kernels is 2.34e-06, above 1e-06"), found.failures)
            val never = verify(replaying(), goldens, fine.copy(minTop1 = 1.01))
            assertEquals(listOf("top-1 outside near ties is 100.0%, below 101%"), never.failures)
        } finally {
            Locale.setDefault(spoken)
        }
    }

    @Test
    fun `a number that is none, and another most likely token, fail`() {
        val none = verify(replaying { it[7] = Float.NaN }, goldens, Limits())
        assertEquals(Verdict.FAIL, none.verdict)
        val other = verify(replaying { it[7] = 9f }, goldens, Limits(maxMeanKl = 1e9))
        assertTrue(other.failures.single().startsWith("top-1 outside near ties is "))
    }

    @Test
    fun `a replay that is stopped leaves the session empty`() {
        val session = replaying()
        assertFailsWith<IllegalStateException> { verify(session, goldens, Limits()) { error("stopped") } }
        assertEquals(0, session.position)
        val ends = replaying { error("the model ended") }
        assertFailsWith<IllegalStateException> { verify(ends, goldens, Limits()) }
        assertEquals(0, ends.position)
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
    fun `speed is that of the clock, by the figures of gemma-runtime bench`() {
        var now = 0L
        val inner = ScriptedSession { 3 }
        val session = object : Session by inner {
            override fun prefill(tokens: IntArray) = inner.prefill(tokens).also { now += 1_000_000L * tokens.size }

            override fun decode(token: Int) = inner.decode(token).also { now += 20_000_000L }
        }
        val found = measureSpeed(session, 400, Workload(listOf(4, 8), 4, 3), repeats = 2, nanoTime = { now })
        assertEquals(listOf(4, 8), found.prompts.map { it.tokens })
        assertEquals(Spread(8.0, 8.0, 8.0), found.prompts[1].firstTokenMs)
        assertEquals(1000.0, found.prompts[0].tokensPerSecond.median, 1e-9)
        assertEquals(Spread(50.0, 50.0, 50.0), found.decodeTokensPerSecond)
        assertEquals(20.0, found.tokenP95Ms.high)
        assertEquals(Workload(listOf(32, 128), 128, 64), Workload.of(500))
        assertEquals(Workload(listOf(24), 12, 12), Workload.of(24))
        assertEquals(Spread(2.5, 1.0, 4.0), Spread.of(listOf(4.0, 1.0, 2.0, 3.0)))
    }
}
