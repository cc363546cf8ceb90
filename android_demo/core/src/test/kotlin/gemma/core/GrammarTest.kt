package gemma.core

import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import java.io.File
import kotlin.random.Random
import kotlin.test.Test
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertIs
import kotlin.test.assertNull
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
        assertIs<JsonException>(assertFailsWith<SchemaException> { GrammarFile("a.json", "{") }.cause)
        assertIs<SchemaException>(assertFailsWith<SchemaException> { GrammarFile("a.json", "{}") }.cause)
    }

    /** They overflowed the stack, or took all memory. */
    @Test
    fun `a grammar that is too deep or grows without end is refused`() {
        val a = """["text", "a"]"""
        fun grammar(nodes: List<String>) = """{"nodes": [$a, ${nodes.joinToString()}], "start": ${nodes.size}}"""
        val hostile = listOf(
            grammar((0..100_000).map { """["repeat", $it, 0, 2]""" }), // nested
            grammar(listOf("""["repeat", 0, 0, 1]""", """["seq"${", 1".repeat(100_000)}]""")), // any number may be left out
            grammar((0..60).map { """["seq", $it, $it]""" }), // 2 to the power of 61
            // alternatives of alternatives: as many as their product
            """{"nodes": [${(0 until 7000).joinToString { """["text", "$it"]""" }}, ["alt"${(0 until 7000).joinToString("") { ", $it" }}], """ +
                """["alt"${", 7000".repeat(20_000)}]], "start": 7001}""",
            // the 30th byte before the end is an a: a state for each set of places
            grammar(listOf("""["bytes", [[97, 98]]]""", """["repeat", 1, 0, null]""", """["repeat", 1, 30, 30]""", """["seq", 2, 0, 3]""")),
        )
        for (text in hostile) {
            val error = assertFailsWith<SchemaException>(text.take(80)) {
                val followed = ByteGrammar.parse(text)
                val random = Random(1)
                followed.follow(followed.start, ByteArray(100_000) { (97 + random.nextInt(2)).toByte() })
            }
            assertContains(error.message.orEmpty(), "too large")
        }
    }

    @Test
    fun `a file of a grammar is read or refused in one line`() {
        fun read(text: ByteArray, name: String = "a.json") = GrammarFile.read(name, text.inputStream())
        val file = read(IN.toByteArray(), "a\n${"b".repeat(100)}.json")
        assertEquals(60, file.name.length)
        assertTrue(file.name.startsWith("a bbb"))
        assertEquals(file, GrammarFile(file.name, IN))
        val refused = mapOf(
            IN.toByteArray() + ByteArray(1 shl 18) { 32 } to "a.json has more than 262144 bytes",
            byteArrayOf(0x22, 0xff.toByte(), 0x22) to "a.json is not UTF-8",
            "{".toByteArray() to "a.json is not JSON: ",
            """{"type": "object"}""".toByteArray() to "a.json: the grammar is not valid: it has no nodes; run gemma-runtime compile-schema again",
        )
        for ((bytes, message) in refused) assertContains(assertFailsWith<SchemaException> { read(bytes) }.message.orEmpty(), message)
    }

    private suspend fun ask(format: AnswerFormat, pieces: Int = 1000): Pair<Reply, String?> {
        val replies = ArrayList<Reply>()
        val outcome = askFormatted(Conversation(ScriptedSession { 300 }, codec, Sampler(Sampling())), "who?", format) { reply ->
            replies += reply
            reply.pieces.take(pieces).toList()
        }
        return replies.last() to outcome
    }

    @Test
    fun `a format holds answers, and says whether it is guaranteed`() = runBlocking<Unit> {
        val grammar = GrammarFile("a.json", IN)
        val cut = GrammarFile("cut.json", """{"nodes": [["text", "i"], ["repeat", 0, 9999, null]], "start": 1}""")
        val (held, none) = ask(AnswerFormat(grammar = grammar))
        assertEquals("in" to null, held.text to none)
        assertEquals("The format is guaranteed by a.json.", guarantee(AnswerFormat(grammar = grammar), held))
        val (long, _) = ask(AnswerFormat(grammar = cut))
        assertEquals(512 to StopReason.LENGTH, long.tokens.size to long.reason)
        assertEquals("The answer was cut, so it doesn't have the format of cut.json.", guarantee(AnswerFormat(grammar = cut), long))
        assertContains(guarantee(AnswerFormat(grammar = cut), ask(AnswerFormat(grammar = cut), 1).first).orEmpty(), "was cut")
        assertNull(guarantee(AnswerFormat(), held))
        val both = AnswerFormat.parse("""{"type": "string"}""", GrammarFile("b.json", """{"nodes": [["text", "\"in\""]], "start": 0}"""))
        assertEquals("The answer matches the schema (first try): \"in\"", ask(both).second)
    }

    @Test
    fun `the input says what is asked for`() {
        val grammar = GrammarFile("a.json", IN)
        val formats = listOf(AnswerFormat.parse(" ", null), AnswerFormat.parse("{}", null), AnswerFormat.parse("\n", grammar), AnswerFormat.parse("{}", grammar))
        assertEquals(listOf("Ask something", "Ask for JSON", "Ask for JSON as in a.json", "Ask for JSON as in a.json"), formats.map { it.hint })
        assertEquals(listOf(EXAMPLE_SCHEMA, "{}", "", "{}"), formats.map { it.schemaText })
        assertFailsWith<SchemaException> { AnswerFormat.parse("[]", grammar) }
        assertFailsWith<JsonException> { AnswerFormat.parse("{", null) }
    }

    private companion object {
        const val IN = """{"nodes": [["text", "in"]], "start": 0}"""
        const val VOCABULARY = 360
    }
}
