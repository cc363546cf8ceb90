package gemma.core

import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import java.io.File
import kotlin.test.Test
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

internal val sessionVectors: JsonFields by lazy { json(File(DATA, "session_vectors.json")) }

/** The tiny bundle's manifest with the layers and lengths of a case. */
internal fun manifestOf(case: JsonFields): Manifest = Manifest.parse(readText(TINY.resolve(MANIFEST))).copy(
    layers = case.of("layers").list { layer ->
        val (window, slots, source) = layer.list { it.countOrNull() }
        val kind = if (window == null) AttentionKind.GLOBAL else AttentionKind.LOCAL
        LayerCache(kind, window, slots ?: 0, kvHeads = 1, headDim = 4, source = source)
    },
    vocabSize = Formula.VOCABULARY,
    contextLength = case.of("context").count(),
    prefillLength = case.of("prefill").count(),
)

/** The model of `tests/data/session_vectors.py`; notes how many tokens and rows each run has. */
internal class Formula(override val givesEveryRow: Boolean = true) : Engine {
    override val runtime = "a formula"
    override val threads: Int? = null
    val runs = ArrayList<List<Int>>()
    private val tokens = ArrayList<Int>()

    override fun run(tokens: IntArray, position: Int, rows: Int): List<FloatArray> {
        runs += listOf(tokens.size, rows)
        this.tokens.subList(position, this.tokens.size).clear()
        this.tokens += tokens.asList()
        return List(rows) { logits(this.tokens.subList(0, this.tokens.size - rows + it + 1)) }
    }

    private fun logits(tokens: List<Int>): FloatArray {
        val last = tokens.last()
        val before = tokens.getOrElse(tokens.size - 2) { 0 }
        val logits = FloatArray(VOCABULARY) { ((7 * before + 13 * last + 11 * it) % 31).toFloat() }
        logits[(5 * last + 3 + (if (tokens.size % 11 == 0) 1 else 0)) % VOCABULARY] += 31f
        return logits
    }

    override fun close() = Unit

    companion object {
        const val VOCABULARY = 24
    }
}

class DraftTest {
    @Test
    fun `drafts give the tokens without them, in Python's runs`() {
        val checked = sessionVectors.of("drafts").list { case ->
            val prompt = case.of("prompt").ints()
            val request = GenerationRequest(prompt, IntArray(0), case.of("max_new_tokens").count(), setOf(case.of("stop_token").count()))
            val sampling = Sampling(repetitionPenalty = case.of("repetition_penalty").double())
            fun run(drafter: Drafter?): Pair<List<Int>, Pair<Int, List<List<Int>>>> {
                val engine = Formula()
                val session = EngineSession(engine, manifestOf(case))
                val tokens = runBlocking { TokenGeneration(session, request, Sampler(sampling), drafter).flow().toList() }
                return tokens to (session.position to engine.runs)
            }
            val (tokens, state) = run(PromptLookup())
            assertEquals(case.of("tokens").ints().asList(), tokens)
            assertEquals(case.of("position").count() to case.of("runs").list { it.ints().asList() }, state)
            val (plain, without) = run(null)
            assertEquals(plain, tokens)
            assertEquals(case.of("plain_runs").count(), without.second.size)
        }
        assertEquals(8, checked.size)
    }

    @Test
    fun `guesses continue the last time that a passage occurred`() {
        assertEquals(listOf(8, 9, 5), PromptLookup().draft(listOf(5, 6, 7, 5, 6, 8, 9, 5, 6), 3))
        assertEquals(listOf(5, 6, 5), PromptLookup().draft(listOf(5, 6, 5, 6), 3))
        assertEquals(emptyList(), PromptLookup().draft(listOf(5, 6, 7), 3))
        assertEquals(emptyList(), PromptLookup().draft(listOf(5, 6, 5, 6), 0))
    }

    @Test
    fun `a graph that gives the last row alone is refused, and the settings leave drafts out`() {
        val manifest = Manifest.parse(readText(TINY.resolve(MANIFEST)))
        val codec = ChatCodec(tinyTokenizer(), ChatFormat.parse(readText(TINY.resolve("chat.json"))), setOf(1, 5))
        val session = EngineSession(Formula(givesEveryRow = false), manifest)
        val error = assertFailsWith<SessionException> { Conversation(session, codec, Sampler(Sampling()), drafts = true).send("the") }
        assertContains(error.message.orEmpty(), "turn them off")
        val settings = ChatSettings(drafts = true)
        settings.conversation(session, codec, manifest, SavedChat("", "", settings)).send("the")
    }

    /** Right guesses are in the cache before their text is shown. */
    @Test
    fun `a reply that was stopped between two right guesses keeps what the cache has`() {
        val tokenizer = tinyTokenizer()
        val codec = ChatCodec(tokenizer, ChatFormat.parse(readText(TINY.resolve("chat.json"))), setOf(1, 5))
        val passage = tokenizer.encode("the user in the inn ")
        val question = encodeChat(tokenizer, codec.format, listOf(Message(Role.USER, "go")))
        val session = ScriptedSession { tokens -> passage[maxOf(0, tokens.size - question.size) % passage.size] }
        val chat = Conversation(session, codec, Sampler(Sampling()), drafts = true)
        val reply = chat.send("go", 60)
        runBlocking { reply.pieces.take(2 * passage.size + 2).toList() }
        assertTrue(reply.tokens.size > 2 * passage.size + 2, "it was stopped between guesses: ${reply.tokens.size}")
        assertEquals(question.asList() + reply.tokens.take(session.position - question.size), session.tokens.toList())
        chat.send("on", 1)
        assertTrue(session.position > question.size, "the caches keep what the turns have in common: ${session.position}")
    }
}

/** A whole number, or null. */
private fun JsonFields.countOrNull(): Int? = if (isNull()) null else count()
