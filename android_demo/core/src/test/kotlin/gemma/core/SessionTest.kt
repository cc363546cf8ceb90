package gemma.core

import kotlinx.coroutines.CancellationException
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertNotNull
import kotlin.test.assertNull

class SessionTest {
    private val manifest = Manifest.parse(readText(TINY.resolve(MANIFEST)))

    /** An engine that notes the chunks and rows it was asked for. */
    private class Recorder(private val vocabSize: Int, override val givesEveryRow: Boolean = true) : Engine {
        override val runtime = "a recorder"
        override val threads: Int? = null
        val calls = ArrayList<Pair<Int, Int>>() // tokens, rows

        override fun run(tokens: IntArray, position: Int, rows: Int): List<FloatArray> {
            calls += tokens.size to rows
            return List(rows) { FloatArray(vocabSize) }
        }

        override fun close() = Unit
    }

    @Test
    fun `a prompt asks for one row a chunk, and stops between two chunks`() {
        val engine = Recorder(manifest.vocabSize)
        val session = EngineSession(engine, manifest)
        session.prefill(IntArray(40))
        assertEquals(listOf(16 to 1, 16 to 1, 8 to 1), engine.calls)
        session.reset()
        var chunks = 0
        assertFailsWith<CancellationException> {
            session.prefill(IntArray(40)) { if (++chunks == 3) throw CancellationException("stopped") }
        }
        assertEquals(32, session.position)
    }

    /** E2B's graph answered with NaN for the tokens whose window had left the ring that its layers share. */
    @Test
    fun `scored chunks end where a ring that layers share is full, as in Python`() {
        val checked = sessionVectors.of("scored").list { case ->
            val engine = Formula()
            val session = EngineSession(engine, manifestOf(case))
            val before = case.of("before").count()
            if (before > 0) session.prefill(IntArray(before) { 2 })
            engine.runs.clear()
            session.score(IntArray(case.of("count").count()) { 2 })
            assertEquals(case.of("runs").list { it.ints().asList() }, engine.runs.toList())
        }
        assertEquals(20, checked.size)
    }

    @Test
    fun `a runtime that gives only the last row is asked token by token`() {
        val engine = Recorder(manifest.vocabSize, givesEveryRow = false)
        EngineSession(engine, manifest).score(IntArray(3))
        assertEquals(listOf(1 to 1, 1 to 1, 1 to 1), engine.calls)
    }

    @Test
    fun `the k-th largest logit is that of a sorted list`() {
        val random = kotlin.random.Random(5)
        repeat(200) {
            val logits = FloatArray(1 + random.nextInt(300)) { random.nextInt(-40, 40) / 8f }
            val k = 1 + random.nextInt(70)
            val expected = if (k >= logits.size) Float.NEGATIVE_INFINITY else logits.sortedDescending()[k - 1]
            assertEquals(expected, kthLargest(logits, k))
        }
        assertContentEquals(intArrayOf(1, 3), topLogits(listOf(floatArrayOf(1f, 5f, Float.NaN, 4f)), 2).ids.single())
        assertContentEquals(intArrayOf(1), topLogits(listOf(floatArrayOf(Float.NaN, 5f, 4f)), 2).ids.single())
    }

    @Test
    fun `every error has a message but a stop`() {
        assertNull(messageFor(CancellationException("stopped")))
        assertEquals("no", messageFor(SessionException("no")))
        for (error in listOf(OutOfMemoryError(), UnsatisfiedLinkError("lib"), IllegalStateException("destroyed"))) {
            assertNotNull(messageFor(error))
        }
    }
}
