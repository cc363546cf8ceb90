package gemma.core

import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.flow.take
import kotlinx.coroutines.runBlocking
import java.io.File
import java.nio.file.Files
import kotlin.test.AfterTest
import kotlin.test.Test
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertFalse
import kotlin.test.assertNull
import kotlin.test.assertTrue

private const val TEXT_GRAMMAR = """{"nodes": [["text", "in"]], "start": 0}"""

class SavedChatsTest {
    private val folder = Files.createTempDirectory("chats").toFile()
    private val chats = SavedChats(folder)
    private val tokenizer = tinyTokenizer()
    private val codec = ChatCodec(tokenizer, ChatFormat.parse(File(TINY, "chat.json").readText()), setOf(1, 5))

    @AfterTest
    fun remove() {
        folder.deleteRecursively()
    }

    /** A session that answers every question with "in". */
    private fun session(contextLength: Int = 4096): ScriptedSession {
        val reply = tokenizer.encode("in").single()
        return ScriptedSession(contextLength) { if (it.last() == reply) 5 else reply }
    }

    private fun talk(chat: SavedChat, session: Session, roll: Boolean = false) =
        Talk(chat, Conversation(session, codec, Sampler(Sampling()), "be brief", roll, earlier = chat.messages, forgotten = chat.forgotten))

    private fun Talk.ask(text: String, nowMs: Long = 1): SavedChat {
        runBlocking { conversation.send(text, 9).pieces.toList() }
        return update(nowMs)
    }

    @Test
    fun `a chat survives its process, and goes on as if nothing had happened`() {
        val settings = ChatSettings("be brief", Sampling(0.7, 5, 0.9, 0.1, 1.2), thinking = true, roll = true, drafts = true, seed = 7)
        val before = session()
        val talk = talk(SavedChat("a", "tiny", settings), before)
        talk.ask("one \"two\"\nthree é😀")
        chats.save(talk.ask("four", nowMs = 1_700_000_000_000))
        val saved = SavedChats(folder).load("a")
        assertEquals(talk.chat, saved)
        assertEquals("one \"two\"", saved.title)
        val after = session()
        talk(saved, after).ask("five")
        talk.ask("five")
        assertEquals(before.tokens, after.tokens)
    }

    /** The schema was the app's, and lost with it. */
    @Test
    fun `what answers must be is saved with the chat, and a change of it feeds nothing again`() {
        val format = AnswerFormat.parse("""{"type": "string"}""", GrammarFile("text.json", TEXT_GRAMMAR))
        val session = session()
        val talk = talk(SavedChat("a", "tiny"), session)
        val first = talk.ask("one")
        val held = first.copy(settings = ChatSettings(format = format))
        assertTrue(talk.goesOnWith(held))
        chats.save(talk.ask("two"))
        assertEquals(format, chats.load("a").settings.format)
        assertEquals(1, session.fed.count { it.firstOrNull() == session.tokens[0] }, "the beginning is fed once")
        assertFalse(talk.goesOnWith(talk.chat.copy(settings = ChatSettings("be brief", format = format))))
        assertFalse(talk.goesOnWith(SavedChat("b", "tiny")))
    }

    @Test
    fun `settings survive without a chat, and an earlier version's name no format`() {
        val settings = ChatSettings("é", Sampling(0.5), seed = 3, format = AnswerFormat(grammar = GrammarFile("t", TEXT_GRAMMAR)))
        assertEquals(settings, ChatSettings.parse(settings.write()))
        val earlier = ChatSettings("é").write().replace(Regex(", \"format\".*"), "}")
        assertEquals(ChatSettings("é"), ChatSettings.parse(earlier))
        assertNull(settings.conflict)
        assertNull(ChatSettings(tools = EXAMPLE_TOOLS).conflict)
        assertContains(settings.copy(tools = EXAMPLE_TOOLS).conflict.orEmpty(), "tap Any answer in Schema")
        for (none in listOf(" ", "[]", "[ ]\n", "[")) assertNull(settings.copy(tools = none).conflict, none)
        assertEquals(setOf("get_weather", "current_time"), ChatSettings(tools = EXAMPLE_TOOLS).toolNames)
        for (damaged in listOf("", "{}", settings.write().replace("nodes", "node"))) assertEquals(ChatSettings(), ChatSettings.parse(damaged))
    }

    @Test
    fun `a stopped reply is kept, and a question without any is not`() {
        val talk = talk(SavedChat("a", "tiny"), session())
        runBlocking { talk.conversation.send("one").pieces.take(1).toList() }
        assertEquals(listOf("one", "in"), talk.update(1).messages.map { it.content })
        talk.conversation.send("never asked")
        assertEquals(listOf("one", "in"), talk.update(2).messages.map { it.content })
        assertEquals(listOf("one", "in", "two", "in"), talk.ask("two").messages.map { it.content })
    }

    @Test
    fun `forgotten turns stay in the chat, and the model doesn't see them again`() {
        val session = session(contextLength = 80)
        val talk = talk(SavedChat("a", "tiny"), session, roll = true)
        repeat(9) { talk.ask("question $it") }
        val chat = talk.chat
        assertEquals((0 until 9).flatMap { listOf("question $it", "in") }, chat.messages.map { it.content })
        assertTrue(chat.forgotten in 2..16)
        assertEquals(talk.conversation.messages.drop(1), chat.messages.drop(chat.forgotten))
        chats.save(chat)
        val other = session(contextLength = 80)
        val again = talk(chats.load("a"), other, roll = true)
        assertEquals(talk.ask("the end"), again.ask("the end"))
        assertEquals(session.tokens, other.tokens)
    }

    @Test
    fun `chats are listed newest first, and a damaged one is named and kept`() {
        for ((id, time) in listOf("a" to 1L, "b" to 3L, "c" to 2L)) {
            chats.save(SavedChat(id, "tiny", messages = listOf(Message(Role.USER, id)), changedMs = time))
        }
        chats.save(SavedChat("empty", "tiny"))
        assertEquals(listOf("b", "c", "a"), chats.all().map { it.id })
        File(folder, "c.json").writeText("{\"version\": 1}")
        File(folder, "b.json").writeText(File(folder, "b.json").readText().replace("\"version\": 1", "\"version\": 2"))
        assertEquals(listOf("a"), chats.all().map { it.id })
        assertEquals(listOf("b", "c"), chats.damaged().sorted())
        assertContains(assertFailsWith<StorageException> { chats.load("c") }.message.orEmpty(), "the chat c can't be read; delete it")
        chats.delete("c")
        assertEquals(listOf("b"), chats.damaged())
    }

    @Test
    fun `a file is replaced as a whole or not at all`() {
        val chat = SavedChat("a", "tiny", messages = listOf(Message(Role.USER, "one")))
        chats.save(chat)
        File(folder, "a.json.part").mkdirs() // in the way
        assertFailsWith<StorageException> { chats.save(chat.copy(messages = listOf(Message(Role.USER, "two")))) }
        assertEquals("one", chats.load("a").title)
    }

    @Test
    fun `with a seed the same question gets the same answer`() {
        val manifest = Manifest.parse(readText(File(TINY, MANIFEST)))
        val even = ScriptedSession { 0 }
        val session = object : Session by even { // all tokens are equally likely
            override fun prefill(tokens: IntArray, beforeChunk: () -> Unit) = FloatArray(300).also { even.prefill(tokens, beforeChunk) }

            override fun decode(token: Int) = FloatArray(300).also { even.decode(token) }
        }
        val settings = ChatSettings(sampling = Sampling(temperature = 1.0), seed = 7)
        val answers = List(3) { turn ->
            val chat = settings.copy(seed = if (turn < 2) 7 else 8).conversation(session, codec, manifest, SavedChat("a", "tiny"))
            List(2) { runBlocking { chat.sendAt(0, "in", 6).also { it.pieces.toList() }.tokens } }
        }
        assertEquals(answers[0], answers[1])
        assertEquals(answers[0][0], answers[0][1])
        assertTrue(answers[0] != answers[2])
    }

    /** It was off without a word, so an answer without thoughts looked like the model's choice. */
    @Test
    fun `thinking is refused where the template has none`() {
        val manifest = Manifest.parse(readText(File(TINY, MANIFEST)))
        val chat = SavedChat("a", "tiny", ChatSettings(thinking = true))
        val error = assertFailsWith<TokenizerException> { chat.settings.conversation(ScriptedSession { 0 }, codec, manifest, chat) }
        assertContains(error.message.orEmpty(), "can't ask for thoughts; turn thinking off in Settings")
    }

    @Test
    fun `settings are read from texts, and bad ones are refused by name`() {
        val base = Sampling(1.0, 64, 0.95, 0.1, 1.1)
        assertNull(SamplingDraft("", " ", "", "\t", "").sampling(base))
        assertEquals(base.copy(temperature = 0.5, topK = 3, topP = 1.0), SamplingDraft("0,5", "3", "1").sampling(base))
        assertEquals(base.copy(minP = 0.25, repetitionPenalty = 1.3), SamplingDraft(minP = "0,25", repetitionPenalty = " 1.3 ").sampling(base))
        assertEquals(Sampling(1.0, 1, 0.5, 1.0, 0.5), SamplingDraft("1", "1", "0.5", "1", "0.5").sampling(base))
        val refused = mapOf<String, Pair<(String) -> SamplingDraft, List<String>>>(
            "temperature" to ({ text: String -> SamplingDraft(temperature = text) } to listOf("x", "-1", "Infinity")),
            "top_k" to ({ text: String -> SamplingDraft(topK = text) } to listOf("x", "2.5", "-1", "1e10", "NaN")),
            "top_p" to ({ text: String -> SamplingDraft(topP = text) } to listOf("x", "2", "0")),
            "min_p" to ({ text: String -> SamplingDraft(minP = text) } to listOf("x", "1.01", "-0.1", "NaN")),
            "repetition_penalty" to ({ text: String -> SamplingDraft(repetitionPenalty = text) } to listOf("x", "0", "-1", "1e39", "1e-39")),
        )
        for ((name, cases) in refused) {
            val (draft, texts) = cases
            for (text in texts) {
                val error = assertFailsWith<SessionException>("$name $text") { draft(text).sampling(base) }
                assertTrue(error.message.orEmpty().startsWith("$name is "), error.message)
            }
        }
        assertEquals(listOf(null, 0, Int.MAX_VALUE), listOf(" ", "0", "2147483647").map(ChatSettings::parseSeed))
        for (text in listOf("-1", "1.5", "2147483648", "x")) {
            assertContains(assertFailsWith<SessionException> { ChatSettings.parseSeed(text) }.message.orEmpty(), "seed is \"$text\"")
        }
        val manifest = Manifest.parse(readText(File(TINY, MANIFEST)))
        assertEquals(manifest.sampling, ChatSettings().samplingFor(manifest))
        assertEquals(base, ChatSettings(sampling = base).samplingFor(manifest))
        assertEquals(Sampling(1.0, 64, 0.95), ChatSettings().samplingFor(manifest.copy(sampling = null)))
    }
}
