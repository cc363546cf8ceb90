package gemma.demo

import gemma.core.Bundle
import gemma.core.BundleSession
import gemma.core.ChatCodec
import gemma.core.ContextFullException
import gemma.core.Conversation
import gemma.core.DATA
import gemma.core.Drafter
import gemma.core.EngineSession
import gemma.core.GenerationRequest
import gemma.core.Manifest
import gemma.core.Sampler
import gemma.core.Sampling
import gemma.core.Session
import gemma.core.SessionException
import gemma.core.StopReason
import gemma.core.TINY
import gemma.core.TokenGeneration
import gemma.core.Verdict
import gemma.core.Workload
import gemma.core.checkAnswersInEarlierPlaces
import gemma.core.checkFigures
import gemma.core.checkReport
import gemma.core.ints
import gemma.core.json
import gemma.core.measureSpeed
import gemma.core.openBundle
import gemma.core.vectors
import gemma.core.verifyBundle
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import org.junit.Assume.assumeTrue
import org.junit.Before
import java.io.File
import java.nio.file.Files
import java.util.concurrent.CancellationException
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertNotNull
import kotlin.test.assertTrue

internal val TEMPORARY = File(System.getProperty("java.io.tmpdir"))

/** Tests the app's backend on ONNX Runtime, with the Java classes and the JNI library of Android's AAR. */
class OnnxEngineTest {
    private val bundle by lazy { openBundle(TINY) }

    @Before
    fun needsTheNativeLibrary() {
        val folder = System.getProperty("onnxruntime.native.path")
        assumeTrue("ONNX Runtime's native library for this machine is not available", folder != null)
    }

    private fun <T> onGraph(graph: String, work: (Session) -> T): T =
        EngineSession(OnnxEngine(bundle, graph, 1, TEMPORARY), bundle.manifest).use(work)

    private fun openSession() = BundleSession(bundle.manifest) { OnnxEngine(bundle, it, 1, TEMPORARY) }

    @Test
    fun `the 64 greedy tokens equal Python's`() = onGraph("exact") { session ->
        val expected = json(File(DATA, "tiny_tokens.json"))
        repeat(2) { // the second time over the used caches
            session.reset()
            val request = GenerationRequest(expected.of("prompt").ints(), IntArray(0), 64, emptySet())
            val generation = TokenGeneration(session, request, Sampler(Sampling()))
            assertEquals(expected.of("tokens").ints().asList(), runBlocking { generation.flow().toList() })
            assertEquals(StopReason.LENGTH, generation.reason)
        }
    }

    @Test
    fun `the greedy tokens with drafts equal Python's without`() = onGraph("exact") { session ->
        val expected = json(File(DATA, "tiny_tokens.json"))
        val request = GenerationRequest(expected.of("prompt").ints(), IntArray(0), 64, emptySet())
        val drafter = Guesses(expected.of("tokens").ints())
        val generation = TokenGeneration(session, request, Sampler(Sampling()), drafter)
        assertEquals(expected.of("tokens").ints().asList(), runBlocking { generation.flow().toList() })
        assertTrue(drafter.right > 8 && drafter.wrong > 8, "${drafter.right} guesses were right, ${drafter.wrong} wrong")
    }

    @Test
    fun `an engine tells the threads that it was opened with`() {
        OnnxEngine(bundle, "decode", 2, TEMPORARY).use { assertEquals(2, it.threads) }
        BundleSession(bundle.manifest) { OnnxEngine(bundle, it, 2, TEMPORARY) }.use { assertEquals(2, it.threads) }
    }

    @Test
    fun `verdict and figures equal those of gemma-runtime verify`() = openSession().use { session ->
        val progress = ArrayList<Int>()
        val verification = verifyBundle(bundle, session) { done, all ->
            assertEquals(10, all)
            progress += done
        }
        assertEquals(Verdict.PASS, verification.verdict, "${verification.failures}")
        assertEquals((1..10).toList(), progress)
        val exact = assertNotNull(verification.exact)
        checkFigures(vectors.of("verify").of("lowering"), exact)
        assertTrue(verification.lowering.meanKl > exact.meanKl, "the shipped graph rounds activations")
        checkReport(bundle, verification, measureSpeed(session, bundle.manifest.vocabSize, Workload.of(96), repeats = 2))
    }

    @Test
    fun `an exact graph that rounds activations fails verification`() {
        // The manifest names the shipped graph, which rounds activations, as the exact one.
        val altered = altered { it.replace("\"file\": \"exact.onnx\"", "\"file\": \"model.onnx\"") }
        BundleSession(altered.manifest) { OnnxEngine(altered, it, 1, TEMPORARY) }.use { session ->
            val verification = verifyBundle(altered, session)
            assertEquals(Verdict.FAIL, verification.verdict)
            assertTrue(verification.failures.single().startsWith("mean KL of the float kernels is "), "${verification.failures}")
        }
    }

    @Test
    fun `a conversation is unaffected by a stopped verification`() = openSession().use { session ->
        val chat = Conversation(session, ChatCodec.load(bundle), Sampler(Sampling()))
        val first = runBlocking { chat.send("the user in the inn", 8).pieces.toList().joinToString("") }
        assertFailsWith<CancellationException> {
            verifyBundle(bundle, session) { done, _ -> if (done == 7) throw CancellationException() }
        }
        assertEquals(0, session.position)
        val again = runBlocking { chat.send("the", 8).also { it.pieces.toList() }.text }
        val fresh = Conversation(session, ChatCodec.load(bundle), Sampler(Sampling()))
        runBlocking { fresh.send("the user in the inn", 8).pieces.toList() }
        assertEquals(first, fresh.messages.last().content)
        assertEquals(again, runBlocking { fresh.send("the", 8).also { it.pieces.toList() }.text })
    }

    @Test
    fun `an edited question is answered as in a new conversation`() =
        openSession().use { checkAnswersInEarlierPlaces(it, ChatCodec.load(bundle)) }

    @Test
    fun `chunks of any length give the same logits, and a full context throws`() = onGraph("exact") { session ->
        val tokens = IntArray(60) { 6 + it * 5 }
        val whole = session.score(tokens)
        session.reset()
        session.prefill(tokens.copyOf(7))
        session.prefill(tokens.copyOfRange(7, 41))
        val last = tokens.drop(41).map { session.decode(it) }.last()
        for (id in last.indices) assertEquals(whole.last()[id], last[id], 1e-4f)
        assertFailsWith<ContextFullException> { session.score(tokens) }
        assertEquals(60, session.position)
    }

    @Test
    fun `a file that is not a model is refused by name`() {
        val broken = altered { it }
        File(broken.directory, "model.onnx").writeText("not a model")
        val error = assertFailsWith<SessionException> { OnnxEngine(broken, "decode", 1, TEMPORARY) }
        assertTrue("can't load model.onnx" in error.message.orEmpty(), error.message)
    }

    /** ONNX Runtime before 1.31 ends the process on graphs whose layers share caches, so it must not get to run them. */
    @Test
    fun `a runtime that is older than the bundle needs is refused`() {
        val newer = altered { it.replace(Regex("\"min_runtime_version\": \"[^\"]*\""), "\"min_runtime_version\": \"1.99.0\"") }
        val error = assertFailsWith<SessionException> { OnnxEngine(newer, "decode", 1, TEMPORARY) }
        assertTrue("this bundle needs at least 1.99.0" in error.message.orEmpty(), error.message)
    }

    private fun altered(manifest: (String) -> String): Bundle {
        val folder = Files.createTempDirectory("bundle").toFile().also { it.deleteOnExit() }
        TINY.copyRecursively(folder, overwrite = true)
        folder.walk().forEach { it.deleteOnExit() }
        val text = manifest(File(folder, "manifest.json").readText())
        return Bundle(folder, Manifest.parse(text))
    }
}

/** Guesses three tokens from the right text, of which the last is wrong each second time. */
private class Guesses(private val text: IntArray) : Drafter {
    var right = 0
        private set
    var wrong = 0
        private set
    private var calls = 0

    override fun draft(tokens: List<Int>, most: Int): List<Int> {
        val next = text.drop(tokens.size - 3).take(minOf(3, most)) // after the three tokens of the prompt
        return if (calls++ % 2 == 0 || next.isEmpty()) next else next.dropLast(1) + (next.last() + 1)
    }

    override fun judge(drafted: Int, accepted: Int) {
        right += accepted
        wrong += drafted - accepted
    }
}
