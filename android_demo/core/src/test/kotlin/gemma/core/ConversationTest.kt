package gemma.core

import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.launch
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
    private val codec = ChatCodec(tokenizer, ChatFormat.parse(File(TINY, "chat.json").readText()), setOf(1, END))

    /** A session that generates these replies in order. */
    private fun replying(vararg replies: String, contextLength: Int = 4096): ScriptedSession {
        val remaining = ArrayDeque(replies.map { ArrayDeque(tokenizer.encode(it).asList() + END) })
        return ScriptedSession(contextLength) {
            val token = remaining.first().removeFirst()
            if (remaining.first().isEmpty()) remaining.removeFirst()
            token
        }
    }

    private fun conversation(session: Session, system: String? = null) = Conversation(session, codec, Sampler(Sampling()), system)

    @Test
    fun `a reply streams whole characters and ends at the stop token`() = runBlocking {
        val reply = conversation(replying("é😀 the")).send("hello")
        val pieces = reply.pieces.toList()
        assertEquals("é😀 the", pieces.joinToString(""))
        assertTrue(pieces.any { it == "😀" })
        assertEquals(StopReason.STOP_TOKEN, reply.reason)
    }

    @Test
    fun `the next turn feeds only what the cache lacks`() = runBlocking {
        val session = replying("in", "out")
        val chat = conversation(session)
        chat.send("one").pieces.toList()
        chat.send("two").pieces.toList()
        val whole = encodeChat(
            tokenizer,
            codec.format,
            listOf(Message(Role.USER, "one"), Message(Role.ASSISTANT, "in"), Message(Role.USER, "two")),
        )
        assertContentEquals(whole, session.tokens.take(whole.size).toIntArray())
        val second = session.fed.first { it.size > 1 && it != session.fed.first() }
        assertEquals(END, second.first())
    }

    @Test
    fun `after a trimmed reply only what differs is fed`() = runBlocking {
        val session = replying("  in ", "out")
        val chat = conversation(session)
        chat.send("one").pieces.toList()
        chat.send("two").pieces.toList()
        assertEquals(1, session.fed.count { it.first() == 2 })
        val whole = encodeChat(tokenizer, codec.format, chat.messages.dropLast(1))
        assertContentEquals(whole, session.tokens.take(whole.size).toIntArray())
    }

    @Test
    fun `a stopped reply counts with the text it has`() = runBlocking {
        val chat = conversation(replying("the user in the inn", "so"))
        val reply = chat.send("one")
        assertEquals(listOf("the"), reply.pieces.take(1).toList())
        assertNull(reply.reason)
        assertEquals(Message(Role.ASSISTANT, "the"), chat.messages.last())
        chat.send("never asked")
        chat.send("two").pieces.toList()
        assertEquals(listOf("one", "the", "two"), chat.messages.take(3).map { it.content })
    }

    @Test
    fun `a full context ends the reply, and refusing the next question changes nothing`() = runBlocking {
        val chat = conversation(ScriptedSession(24) { 300 })
        val reply = chat.send("in")
        reply.pieces.toList()
        assertEquals(StopReason.CONTEXT, reply.reason)
        val before = chat.messages
        assertFailsWith<ContextFullException> { chat.send("more and more and more") }
        assertEquals(before, chat.messages)
        chat.reset()
        assertEquals(StopReason.LENGTH, chat.send("in", 2).also { it.pieces.toList() }.reason)
    }

    @Test
    fun `a rolling chat forgets the oldest turns, and goes on as a new one that begins with the kept turns`() = runBlocking {
        val session = replying(*Array(8) { "the inn" }, contextLength = 96)
        val chat = Conversation(session, codec, Sampler(Sampling()), system = "be brief", roll = true)
        val forgotten = (0 until 8).sumOf { turn -> chat.send("question $turn").also { it.pieces.toList() }.forgotten }
        assertTrue(forgotten > 0)
        assertEquals(1 + 2 * 8 - forgotten, chat.messages.size)
        assertEquals(listOf("be brief", "question 7"), listOf(chat.messages.first(), chat.messages[chat.messages.size - 2]).map { it.content })
        val fresh = encodeChat(tokenizer, codec.format, chat.messages.dropLast(1))
        assertContentEquals(fresh, session.tokens.take(fresh.size).toIntArray())
        val before = chat.messages
        assertFailsWith<ContextFullException> { chat.send("more ".repeat(90)) }
        assertEquals(before, chat.messages)
    }

    @Test
    fun `a question in an earlier place replaces what follows, once its reply begins`() = runBlocking {
        val session = replying("in", "out", "er", "us", "the")
        val chat = conversation(session, "be brief")
        for (question in listOf("one", "two")) chat.send(question).pieces.toList()
        val before = chat.turns
        chat.sendAt(0, "never answered")
        assertEquals(before, chat.turns)
        for (index in listOf(-1, 1, 3, 5)) assertFailsWith<SessionException> { chat.sendAt(index, "x") }
        assertFailsWith<ContextFullException> { chat.sendAt(2, "more ".repeat(3000)) }
        assertEquals(before, chat.turns)
        chat.sendAt(2, "three").pieces.toList()
        assertEquals(listOf("one", "in", "three", "er"), chat.turns.map { it.content })
        chat.sendAt(2, "three").pieces.toList()
        chat.sendAt(4, "four").pieces.toList()
        assertEquals(listOf("be brief", "one", "in", "three", "us", "four", "the"), chat.messages.map { it.content })
        val whole = encodeChat(tokenizer, codec.format, chat.messages.dropLast(1))
        assertContentEquals(whole, session.tokens.take(whole.size).toIntArray())
        assertEquals(1, session.fed.count { it.first() == 2 }, "the beginning was fed once")
    }

    @Test
    fun `a place among forgotten turns brings back those before it, and an answer again draws other tokens`() = runBlocking {
        val session = ScriptedSession(96) { if (it.last() >= 300) END else 300 }
        val chat = Conversation(session, codec, Sampler(Sampling()), roll = true)
        repeat(8) { chat.send("question $it").pieces.toList() }
        assertEquals(16, chat.turns.size)
        assertTrue(chat.forgotten > 2)
        val before = chat.turns
        chat.sendAt(2, "never answered")
        assertTrue(chat.turns == before && chat.forgotten > 2)
        chat.sendAt(2, "again").pieces.toList()
        assertEquals(before.take(2) + listOf("again", tokenizer.decode(intArrayOf(300))).zip(listOf(Role.USER, Role.ASSISTANT)) { text, role -> Message(role, text) }, chat.turns)
        assertEquals(0, chat.forgotten)
        var drawn = 0
        val noise = { listOf(0.2, 0.8)[drawn++] }
        val even = object : Session by session {
            override fun prefill(tokens: IntArray, beforeChunk: () -> Unit) = FloatArray(400).also { session.prefill(tokens, beforeChunk) }
        }
        val sampled = Conversation(even, codec, Sampler(Sampling(temperature = 1.0), noise))
        val replies = List(2) { sampled.sendAt(0, "in", 1).also { it.pieces.toList() }.tokens }
        assertEquals(listOf(80, 320), replies.flatten())
    }

    @Test
    fun `a grammar holds what follows a thought`() = runBlocking {
        val codec = gemma4Codec()
        val grammar = ByteGrammar.parse("""{"nodes": [["text", "in"], ["text", "the"], ["alt", 0, 1]], "start": 2}""")
        val thought = codec.tokenizer.encodeTemplate("<|channel>thought\nin the").asList()
        val closes = codec.tokenizer.encodeTemplate("<channel|>").asList()
        for ((thinking, expected) in listOf(true to "in the", false to "")) {
            var next = 0
            val script = thought + closes
            val chat = Conversation(
                ScriptedSession { script.getOrElse(next++) { 5 } }, codec, Sampler(Sampling()), thinking = thinking,
            )
            val reply = chat.send("us", grammar = grammar)
            reply.pieces.collect {}
            assertEquals(StopReason.CONSTRAINT, reply.reason)
            assertTrue(reply.text in listOf("in", "the"), reply.text)
            assertEquals(expected, reply.thought)
        }
        val state = GrammarState(grammar, codec.tokenizer, setOf(5), thinking = true)
        state.accept(thought.first())
        assertTrue(state.allows(closes.single()) && !state.allows(5) && !state.isDone)
    }

    @Test
    fun `thoughts are kept apart, and later turns don't see them`() = runBlocking {
        val codec = gemma4Codec()
        val tokenizer = codec.tokenizer
        val said = tokenizer.encodeTemplate("<|channel>thought\nin the<channel|>user").asList() + 5
        var next = 0
        val session = ScriptedSession { said[next++ % said.size] }
        val chat = Conversation(session, codec, Sampler(Sampling()), "be brief", thinking = true)
        repeat(2) {
            val reply = chat.send("us")
            val wasThinking = ArrayList<Boolean>()
            val pieces = ArrayList<String>()
            reply.pieces.collect { piece ->
                pieces += piece
                wasThinking += reply.isThinking
            }
            assertEquals(listOf("user", "in the"), listOf(pieces.joinToString(""), reply.thought))
            assertEquals(listOf(true, false), listOf(wasThinking.first(), wasThinking.last()))
            assertEquals(said.size - 1, reply.tokens.size)
            assertEquals(session.position, reply.contextTokens)
        }
        assertEquals(listOf("be brief", "us", "user", "us", "user"), chat.messages.map { it.content })
        assertEquals(1, session.tokens.count { it == said.first() }, "the first thought has left the cache")
        val plain = ChatCodec(this@ConversationTest.tokenizer, this@ConversationTest.codec.format, setOf(5))
        assertTrue(codec.canThink && !plain.canThink)
        assertFailsWith<TokenizerException> { Conversation(session, plain, Sampler(Sampling()), thinking = true) }.let {
            assertTrue("can't ask for thoughts" in it.message.orEmpty())
        }
    }

    @Test
    fun `a question that is stopped while it is fed leaves no trace`() = runBlocking {
        val manifest = Manifest.parse(readText(File(TINY, MANIFEST)))
        var stop: () -> Unit = {}
        val engine = object : Engine {
            override val givesEveryRow = true
            override val runtime = "a script"
            override val threads: Int? = null

            override fun run(tokens: IntArray, position: Int, rows: Int): List<FloatArray> {
                stop()
                return List(rows) { FloatArray(manifest.vocabSize).also { it[END] = 1f } }
            }

            override fun close() = Unit
        }
        val session = EngineSession(engine, manifest)
        val chat = conversation(session)
        val question = "the inn ".repeat(8)
        val task = launch { chat.send(question).pieces.collect {} }
        stop = { task.cancel() }
        task.join()
        assertEquals(16, session.position, "it stopped after the first of several chunks")
        assertEquals(emptyList(), chat.messages)
        stop = {}
        assertEquals(StopReason.STOP_TOKEN, chat.send("in").also { it.pieces.toList() }.reason)
    }

    @Test
    fun `a runtime older than the bundle requires is refused`() {
        listOf("1.29.0", "1.29.1", "1.30.0-rc1", "2.0").forEach { checkRuntime("onnxruntime", it, "1.29.0") }
        for (older in listOf("1.9.9", "1.28.5", "0.99")) {
            assertFailsWith<SessionException>(older) { checkRuntime("onnxruntime", older, "1.29.0") }
        }
    }

    @Test
    fun `an invalid answer is asked for again with its violations`() = runBlocking {
        val schema = Schema.parse("""{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}""")
        val chat = conversation(replying("no idea", """{"n": "x"}""", """Here: {"n": 3}"""))
        val valid = StructuredResult.Valid(JsonObject(mapOf("n" to JsonNumber(3.0))))
        val answer = askStructured(chat, "count", schema)
        assertEquals(StructuredAnswer(valid, 3), answer)
        assertEquals("The answer matches the schema (3 tries): {\"n\": 3}", answer.summary())
        assertTrue("expected integer" in chat.messages[4].content)
        val shown = ArrayList<String>()
        val stubborn = conversation(replying("no", "{}", """{"n": 4}"""))
        val invalid = askStructured(stubborn, "count", schema, attempts = 2) { reply ->
            shown += reply.pieces.toList().joinToString("")
        }
        assertEquals(listOf("no", "{}"), shown)
        assertEquals("The answer does not match the schema (2 tries):\n- $: \"n\" is missing", invalid.summary())
        assertEquals(4, stubborn.turns.size)
        val last = assertNotNull(lastQuestion(stubborn.turns), "the request, not the retry")
        assertEquals(listOf("count", stubborn.turns[0].content), listOf(schema, null).map { requestIn(stubborn.turns[last].content, it) })
        askStructured(stubborn, requestIn(stubborn.turns[last].content, schema), schema, index = last)
        assertEquals(listOf(structuredPrompt("count", schema), """{"n": 4}"""), stubborn.turns.map { it.content })
        val endless = askStructured(conversation(ScriptedSession { 300 }), "count", schema, 1, maxNewTokens = 9) { reply ->
            reply.pieces.collect {}
            assertEquals(StopReason.LENGTH, reply.reason)
        }
        assertTrue("no complete JSON" in endless.summary())
    }
}

class TinyModelTest {
    private val manifest = openBundle(TINY).manifest

    private fun withTinyModel(check: (Session) -> Unit) =
        EngineSession(BridgeEngine(manifest.vocabSize), manifest).use(check)

    @Test
    fun `the 64 greedy tokens equal Python's`() = withTinyModel { session ->
        val expected = json(File(DATA, "tiny_tokens.json"))
        val request = GenerationRequest(expected.of("prompt").ints(), IntArray(0), 64, emptySet())
        val generation = TokenGeneration(session, request, Sampler(Sampling()))
        assertEquals(expected.of("tokens").ints().asList(), runBlocking { generation.flow().toList() })
        assertEquals(64, generation.tokens.size)
        assertEquals(StopReason.LENGTH, generation.reason)
    }

    @Test
    fun `the goldens' figures equal those of gemma-runtime verify`() = withTinyModel { session ->
        val bundle = Bundle(TINY, manifest)
        val verification = verify(session, loadGoldens(bundle), Limits())
        assertEquals(Verdict.PASS, verification.verdict)
        checkFigures(vectors.of("verify").of("lowering"), verification.lowering)
        checkFigures(vectors.of("verify").of("quantization"), verification.quantization)
        checkReport(bundle, verification, measureSpeed(session, manifest.vocabSize, Workload(listOf(4, 8), 4, 3), repeats = 2))
    }

    @Test
    fun `an edited question is answered as in a new conversation`() =
        withTinyModel { checkAnswersInEarlierPlaces(it, ChatCodec.load(Bundle(TINY, manifest))) }

    @Test
    fun `a session goes back exactly, or to 0 where its caches were shortened since`() = withTinyModel { session ->
        val tokens = IntArray(90) { 3 + it * 7 % 300 }
        val answers = listOf(1, 8, 9, 62, 63, 72, 75).map { position ->
            session.reset()
            session.prefill(tokens.copyOf(position))
            val expected = session.decode(3)
            session.prefill(IntArray(9) { 5 })
            val answer = session.rewind(position)
            assertEquals(answer, session.position)
            if (answer == 0) session.prefill(tokens.copyOf(position))
            assertContentEquals(expected, session.decode(3))
            answer
        }
        assertEquals(listOf(1, 8, 9, 62, 0, 0, 75), answers)
        assertFailsWith<SessionException> { session.rewind(77) }
    }

    @Test
    fun `both graphs of a bundle are replayed, one at a time`() {
        val events = ArrayList<String>()
        val session = BundleSession(manifest) { graph ->
            events += graph
            val engine = BridgeEngine(manifest.vocabSize, graph)
            object : Engine by engine {
                override fun close() = engine.close().also { events += "closed" }
            }
        }
        val verification = session.use { verifyBundle(Bundle(TINY, manifest), it) }
        assertEquals(listOf("decode", "closed", "exact", "closed", "decode", "closed"), events)
        assertEquals(Verdict.PASS, verification.verdict)
        checkFigures(vectors.of("verify").of("lowering"), assertNotNull(verification.exact))
        assertFailsWith<SessionException> { session.decode(2) }
    }
}
