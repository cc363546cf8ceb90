package gemma.core

import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import java.io.File
import kotlin.random.Random
import kotlin.test.Test
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertIs
import kotlin.test.assertTrue

/** Grammars that Python compiled; what they allow was taken from llguidance. */
class GrammarTest {
    private val cases = (parseJson(File(DATA, "grammar_vectors.json").readText()) as JsonArray).items
    private val tokenizer = tinyTokenizer()
    private val codec = ChatCodec(tokenizer, ChatFormat.parse(File(TINY, "chat.json").readText()), setOf(1, 5))

    private fun grammar(case: Json) = ByteGrammar.of(case.field("grammar"))

    private fun text(json: Json): String = (json as JsonString).text

    private fun mask(grammar: ByteGrammar, state: Int): String {
        val bytes = IntArray(32)
        for (byte in 0..255) {
            if (grammar.after(state, byte) != ByteGrammar.NOTHING) bytes[byte / 8] = bytes[byte / 8] or (1 shl byte % 8)
        }
        return bytes.joinToString("") { "%02x".format(it) } + if (grammar.mayEnd(state)) "$" else ""
    }

    /** A session with random logits. */
    private fun random(seed: Int): Session {
        val random = Random(seed)
        val scripted = ScriptedSession { 0 }
        return object : Session by scripted {
            override fun prefill(tokens: IntArray, beforeChunk: () -> Unit): FloatArray {
                scripted.prefill(tokens)
                return FloatArray(VOCABULARY) { random.nextFloat() * 9 }
            }

            override fun decode(token: Int): FloatArray = prefill(intArrayOf(token))
        }
    }

    @Test
    fun `each beginning of a text allows what llguidance allows`() {
        for (case in cases) {
            val grammar = grammar(case)
            for (vector in (case.field("texts") as JsonArray).items) {
                val bytes = text(vector.field("text")).toByteArray()
                val states = (0..bytes.size).map { grammar.follow(grammar.start, bytes.copyOf(it)) }
                val expected = (vector.field("masks") as JsonArray).items.map(::text)
                assertEquals(expected, states.map { mask(grammar, it) }, text(vector.field("text")))
            }
        }
        assertTrue(cases.size > 8)
    }

    @Test
    fun `random logits give a value of the schema`() = runBlocking<Unit> {
        val samplings = listOf(Sampling(), Sampling(temperature = 1.0, topK = 5, topP = 0.9), Sampling(temperature = 1.0))
        var complete = 0
        for (case in cases) {
            val schema = Schema.of(case.field("schema"))
            samplings.forEachIndexed { seed, sampling ->
                val random = Random(seed)
                val chat = Conversation(random(seed), codec, Sampler(sampling, random::nextDouble))
                val reply = chat.send("in", 150, grammar(case))
                reply.pieces.toList()
                if (reply.reason == StopReason.LENGTH) return@forEachIndexed // a string or array without an end
                assertIs<StructuredResult.Valid>(checkStructured(reply.text, schema), reply.text)
                parseJson(reply.text)
                complete++
            }
        }
        assertTrue(complete > 2 * cases.size)
    }

    @Test
    fun `a grammar holds one reply, and its end ends the reply`() = runBlocking<Unit> {
        val grammar = ByteGrammar.parse("""{"nodes": [["text", "in"], ["text", "the"], ["alt", 0, 1]], "start": 2}""")
        val chat = Conversation(ScriptedSession { 300 }, codec, Sampler(Sampling()))
        val reply = chat.send("us", grammar = grammar)
        reply.pieces.toList()
        assertContains(listOf("in", "the"), reply.text)
        assertEquals(StopReason.CONSTRAINT, reply.reason)
        assertEquals(StopReason.LENGTH, chat.send("us", 3).also { it.pieces.toList() }.reason)
    }

    @Test
    fun `with a grammar the first answer is valid`() = runBlocking<Unit> {
        val case = cases.first()
        val chat = Conversation(random(1), codec, Sampler(Sampling()))
        val answer = askStructured(chat, "who?", Schema.of(case.field("schema")), grammar = grammar(case))
        assertEquals(1, answer.attempts)
        assertIs<StructuredResult.Valid>(answer.result)
    }

    @Test
    fun `no control token is allowed, and a stop token only at the end`() {
        val grammar = ByteGrammar.parse("""{"nodes": [["bytes", [[0, 255]]], ["repeat", 0, 1, null]], "start": 1}""")
        val state = GrammarState(grammar, tokenizer, setOf(1, 5))
        val allowed = (0 until VOCABULARY).filter(state::allows)
        assertTrue(allowed.size > 100)
        assertTrue(allowed.all { tokenizer.byteOf(it) >= 0 || tokenizer.textOf(it).isNotEmpty() })
        state.accept(allowed.last())
        assertEquals(listOf(1, 5), (0 until VOCABULARY).filter(state::allows) - allowed.toSet())
    }

    @Test
    fun `a damaged grammar is refused`() {
        val damaged = listOf(
            "[]", "{}", """{"nodes": [], "start": 0}""", """{"nodes": [["text", "a"]], "start": 1}""",
            """{"nodes": [["text", 1]], "start": 0}""", """{"nodes": [["bytes", []]], "start": 0}""",
            """{"nodes": [["bytes", [[9, 8]]]], "start": 0}""", """{"nodes": [["bytes", [[0, 256]]]], "start": 0}""",
            """{"nodes": [["seq", 0]], "start": 0}""", """{"nodes": [["text", "a"], ["repeat", 0, 2, 1]], "start": 1}""",
            """{"nodes": [["text", "a"], ["repeat", 0]], "start": 1}""", """{"nodes": [["loop", 0]], "start": 0}""",
        )
        for (text in damaged) assertFailsWith<SchemaException>(text) { ByteGrammar.parse(text) }
        assertFailsWith<JsonException> { ByteGrammar.parse("{") }
    }

    private companion object {
        const val VOCABULARY = 360
    }
}
