package gemma.core

import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import java.io.File
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertNotNull
import kotlin.test.assertNull
import kotlin.test.assertTrue

private const val END = 5 // <end_of_turn>

class ConversationTest {
    private val tokenizer = tinyTokenizer()
    private val voice = Voice(tokenizer, ChatFormat.parse(File(TINY, "chat.json").readText()), 2, setOf(1, END))

    /** A session that says these replies, one after the other. */
    private fun saying(vararg replies: String, contextLength: Int = 4096): ScriptedSession {
        val said = ArrayDeque(replies.map { ArrayDeque(tokenizer.encode(it).asList() + END) })
        return ScriptedSession(contextLength) {
            val token = said.first().removeFirst()
            if (said.first().isEmpty()) said.removeFirst()
            token
        }
    }

    private fun conversation(session: Session, system: String? = null) = Conversation(session, voice, Sampler(Sampling()), system)

    @Test
    fun `a reply streams whole characters and ends at the stop token`() = runBlocking {
        val reply = conversation(saying("é😀 the")).send("hello")
        val pieces = reply.pieces.toList()
        assertEquals("é😀 the", pieces.joinToString(""))
        assertTrue(pieces.any { it == "😀" })
        assertEquals(StopReason.STOP_TOKEN, reply.reason)
    }

    @Test
    fun `the next turn feeds only what the cache lacks`() = runBlocking {
        val session = saying("in", "out")
        val talk = conversation(session)
        talk.send("one").pieces.toList()
        talk.send("two").pieces.toList()
        val whole = encodeChat(
            tokenizer,
            voice.format,
            listOf(Message(Role.USER, "one"), Message(Role.ASSISTANT, "in"), Message(Role.USER, "two")),
            2,
        )
        assertContentEquals(whole, session.tokens.take(whole.size).toIntArray())
        val second = session.fed.first { it.size > 1 && it != session.fed.first() }
        assertEquals(END, second.first())
    }

    @Test
    fun `a trimmed reply empties the cache`() = runBlocking {
        val session = saying("  in ", "out")
        val talk = conversation(session)
        talk.send("one").pieces.toList()
        talk.send("two").pieces.toList()
        assertEquals(2, session.fed.count { it.first() == 2 })
    }

    @Test
    fun `a stopped reply counts as far as it came`() = runBlocking {
        val talk = conversation(saying("the user in the inn", "so"))
        val reply = talk.send("one")
        assertEquals(listOf("the"), reply.pieces.take(1).toList())
        assertNull(reply.reason)
        assertEquals(Message(Role.ASSISTANT, "the"), talk.messages.last())
        talk.send("never asked")
        talk.send("two").pieces.toList()
        assertEquals(listOf("one", "the", "two"), talk.messages.take(3).map { it.content })
    }

    @Test
    fun `a full context ends the reply, and the next question is refused and changes nothing`() = runBlocking {
        val talk = conversation(ScriptedSession(24) { 300 })
        val reply = talk.send("in")
        reply.pieces.toList()
        assertEquals(StopReason.CONTEXT, reply.reason)
        val before = talk.messages
        assertFailsWith<ContextFullException> { talk.send("more and more and more") }
        assertEquals(before, talk.messages)
        talk.reset()
        assertEquals(StopReason.LENGTH, talk.send("in", 2).also { it.pieces.toList() }.reason)
    }

    @Test
    fun `a runtime older than the bundle asks for is refused`() {
        listOf("1.29.0", "1.29.1", "1.30.0-rc1", "2.0").forEach { checkRuntime("onnxruntime", it, "1.29.0") }
        for (older in listOf("1.9.9", "1.28.5", "0.99")) {
            assertFailsWith<SessionException>(older) { checkRuntime("onnxruntime", older, "1.29.0") }
        }
    }

    @Test
    fun `an answer that is not right is asked again with what was wrong`() = runBlocking {
        val schema = Schema.parse("""{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}""")
        val talk = conversation(saying("no idea", """{"n": "x"}""", """Here: {"n": 3}"""))
        val right = StructuredResult.Valid(JsonObject(mapOf("n" to JsonNumber(3.0))))
        val answer = askStructured(talk, "count", schema)
        assertEquals(StructuredAnswer(right, 3), answer)
        assertEquals("The answer matches the schema (3 tries): {\"n\": 3}", answer.inWords())
        assertTrue("expected integer" in talk.messages[4].content)
        val shown = ArrayList<String>()
        val never = askStructured(conversation(saying("no", "{}")), "count", schema, attempts = 2) { reply ->
            shown += reply.pieces.toList().joinToString("")
        }
        assertEquals(listOf("no", "{}"), shown)
        assertEquals("The answer does not match the schema (2 tries):\n- $: \"n\" is missing", never.inWords())
        val endless = askStructured(conversation(ScriptedSession { 300 }), "count", schema, 1, maxNewTokens = 9) { reply ->
            reply.pieces.collect {}
            assertEquals(StopReason.LENGTH, reply.reason)
        }
        assertTrue("no whole JSON" in endless.inWords())
    }
}

class TinyModelTest {
    private val manifest = openBundle(TINY).manifest

    private fun withTinyModel(check: (Session) -> Unit) =
        EngineSession(BridgeEngine(manifest.vocabSize), manifest).use(check)

    @Test
    fun `the loop says the same 64 tokens as Python's`() = withTinyModel { session ->
        val said = json(File(DATA, "tiny_tokens.json"))
        val request = GenerationRequest(said.of("prompt").ints(), IntArray(0), 64, emptySet())
        val generation = TokenGeneration(session, request, Sampler(Sampling()))
        assertEquals(said.of("tokens").ints().asList(), runBlocking { generation.flow().toList() })
        assertEquals(64, generation.tokens.size)
        assertEquals(StopReason.LENGTH, generation.reason)
    }

    @Test
    fun `the goldens give the figures of gemma-runtime verify`() = withTinyModel { session ->
        val bundle = Bundle(TINY, manifest)
        val found = verify(session, loadGoldens(bundle), Limits())
        assertEquals(Verdict.PASS, found.verdict)
        checkFigures(vectors.of("verify").of("lowering"), found.lowering)
        checkFigures(vectors.of("verify").of("quantization"), found.quantization)
        checkReport(bundle, found, measureSpeed(session, manifest.vocabSize, Workload(listOf(4, 8), 4, 3), repeats = 2))
    }

    @Test
    fun `both graphs of a bundle are replayed, one at a time`() {
        val open = ArrayList<String>()
        val session = BundleSession(manifest) { graph ->
            open += graph
            val engine = BridgeEngine(manifest.vocabSize, graph)
            object : Engine by engine {
                override fun close() = engine.close().also { open += "closed" }
            }
        }
        val found = session.use { verifyBundle(Bundle(TINY, manifest), it) }
        assertEquals(listOf("decode", "closed", "exact", "closed", "decode", "closed"), open)
        assertEquals(Verdict.PASS, found.verdict)
        checkFigures(vectors.of("verify").of("lowering"), assertNotNull(found.exact))
        assertFailsWith<SessionException> { session.decode(2) }
    }
}
