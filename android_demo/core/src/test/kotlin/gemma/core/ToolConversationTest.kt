package gemma.core

import kotlinx.coroutines.flow.take
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import java.io.File
import java.nio.file.Files
import java.util.Date
import java.util.TimeZone
import kotlin.test.AfterTest
import kotlin.test.Test
import kotlin.test.assertContains
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertNotNull
import kotlin.test.assertNull
import kotlin.test.assertTrue

private const val END = 5 // the token that ends a turn, in both tokenizers

private const val CALL = """{"name": "get_weather", "parameters": {"city": "inn"}}"""
private const val MARKED = "<|tool_call>call:get_weather{city:<|\"|>inn<|\"|>}<tool_call|>"

class ToolConversationTest {
    private val folder = Files.createTempDirectory("chats").toFile()
    private val tools = Tools.parse(EXAMPLE_TOOLS)
    private val sunny = parseJson("""{"sky": "clear"}""")
    private val prompted = ChatCodec(tinyTokenizer(), toolVectors.of("formats").map(ChatFormat::read).getValue("gemma3"), setOf(1, END))
    private val gemma4 = gemma4Codec()

    @AfterTest
    fun remove() {
        folder.deleteRecursively()
    }

    /** A session that generates these replies, in which names of control tokens are tokens. */
    private fun replying(codec: ChatCodec, vararg replies: String, contextLength: Int = 8192): ScriptedSession {
        val remaining = ArrayDeque(replies.map { ArrayDeque(codec.tokenizer.encodeTemplate(it).asList() + END) })
        return ScriptedSession(contextLength) {
            val token = remaining.first().removeFirst()
            if (remaining.first().isEmpty() || token in codec.ends) remaining.removeFirst()
            token
        }
    }

    private fun conversation(session: Session, codec: ChatCodec, thinking: Boolean = false, roll: Boolean = false, tools: Tools = this.tools) =
        Conversation(session, codec, Sampler(Sampling()), "be brief", roll, thinking, tools = tools)

    private fun Reply.read(): Reply = also { runBlocking { pieces.toList() } }

    /** What was fed for the last reply is a new conversation with the same turns. */
    private fun checkFed(chat: Conversation, session: ScriptedSession, format: ChatFormat, codec: ChatCodec) {
        val whole = encodeChat(codec.tokenizer, format, chat.messages.dropLast(1), tools)
        assertContentEquals(whole, session.tokens.take(whole.size).toIntArray())
    }

    @Test
    fun `a reply has its calls, and the model answers their results`() {
        for ((codec, call) in listOf(prompted to "the\n```json\n$CALL\n```", gemma4 to "the $MARKED<|tool_response>never said")) {
            val session = replying(codec, call, "it is clear", "so")
            val chat = conversation(session, codec)
            val reply = chat.send("the user?").read()
            val expected = ToolCall("get_weather", JsonObject(mapOf("city" to JsonString("inn"))))
            assertEquals("the" to listOf(expected), reply.text to reply.toolCalls)
            assertEquals("get_weather(city: \"inn\")", expected.summary)
            assertEquals(StopReason.STOP_TOKEN, reply.reason)
            assertEquals(listOf(expected), openCalls(chat.turns))
            val answer = chat.sendResults(listOf(sunny)).read()
            assertEquals("it is clear" to emptyList(), answer.text to answer.toolCalls)
            assertEquals(listOf("""get_weather returned: {"sky": "clear"}"""), answer.results.map(::shownResult))
            assertEquals(listOf(Role.USER, Role.ASSISTANT, Role.TOOL, Role.ASSISTANT), chat.turns.map { it.role })
            checkFed(chat, session, codec.format, codec)
            chat.send("in?").read()
            checkFed(chat, session, codec.format, codec)
            assertEquals(4, lastQuestion(chat.turns))
        }
    }

    @Test
    fun `results must be as many as calls, and refused ones change nothing`() {
        val chat = conversation(replying(prompted, CALL, "so"), prompted)
        assertContains(assertFailsWith<SessionException> { chat.sendResults(listOf(sunny)) }.message.orEmpty(), "calls 0 tools, but there are 1 results")
        chat.send("one").read()
        assertContains(assertFailsWith<SessionException> { chat.sendResults(emptyList()) }.message.orEmpty(), "calls 1 tools, but there are 0")
        val before = chat.turns
        chat.sendResults(listOf(sunny)) // never collected
        assertEquals(before, chat.turns)
        chat.sendResults(listOf(JsonString("clear"))).read()
        assertEquals("clear", chat.turns[2].content)
    }

    @Test
    fun `a stopped reply calls nothing`() {
        val chat = conversation(replying(prompted, CALL), prompted)
        val reply = chat.send("one")
        runBlocking { reply.pieces.take(20).toList() }
        assertEquals(emptyList(), reply.toolCalls)
        assertEquals(listOf("one", reply.text), chat.turns.map { it.content })
    }

    @Test
    fun `a chat without tools has no calls, whatever the reply has`() {
        for ((codec, text) in listOf(prompted to CALL, gemma4 to MARKED)) {
            val chat = conversation(replying(codec, text), codec, tools = Tools.NONE)
            val reply = chat.send("one").read()
            assertEquals(emptyList(), reply.toolCalls + openCalls(chat.turns))
            assertContains(reply.text, "inn")
        }
    }

    @Test
    fun `the app answers no call of a tool that the chat lacks`() {
        val call = "<|tool_call>call:current_time{}<tool_call|>"
        fun answered(tools: Tools): Int {
            val chat = conversation(replying(gemma4, call, "noon"), gemma4, tools = tools)
            assertEquals(listOf("current_time"), chat.send("when?").read().toolCalls.map { it.name })
            runBlocking { answerBuiltIn(chat, { JsonString("noon") }) }
            return chat.turns.size
        }
        assertEquals(4, answered(tools))
        assertEquals(2, answered(Tools(tools.schemas.take(1))))
    }

    @Test
    fun `a thought before calls is kept until the user's next turn, and after results one begins`() {
        val session = replying(gemma4, "<|channel>thought\nin the inn<channel|>$MARKED<|tool_response>", "the<channel|>it is", "so")
        val chat = conversation(session, gemma4, thinking = true)
        val format = assertNotNull(gemma4.format.thinking)
        assertEquals("in the inn", chat.send("one").read().thought)
        assertEquals("in the inn", chat.turns[1].thought)
        val answer = chat.sendResults(listOf(sunny)).read()
        assertEquals("the" to "it is", answer.thought to answer.text)
        checkFed(chat, session, format, gemma4)
        assertContains(gemma4.tokenizer.decode(session.tokens.toIntArray()), "in the inn\n")
        assertEquals("", chat.turns.last().thought)
        chat.send("two").read()
        checkFed(chat, session, format, gemma4)
        assertTrue("in the inn\n" !in gemma4.tokenizer.decode(session.tokens.toIntArray()))
    }

    @Test
    fun `a rolling chat forgets a question with its calls and results`() {
        for ((codec, call) in listOf(prompted to CALL, gemma4 to "$MARKED<|tool_response>")) {
            val replies = (0 until 8).flatMap { listOf(call, "the inn") }.toTypedArray()
            val first = listOf(Message(Role.SYSTEM, "be brief"), Message(Role.USER, "question 1"))
            val length = encodeChat(codec.tokenizer, codec.format, first, tools).size
            val session = replying(codec, *replies, contextLength = (length + 300) * 4 / 3)
            val chat = conversation(session, codec, roll = true)
            repeat(8) {
                chat.send("question $it").read()
                chat.sendResults(listOf(sunny)).read()
            }
            assertEquals(32, chat.turns.size)
            assertTrue(chat.forgotten in 4..28 && chat.forgotten % 4 == 0, "${chat.forgotten}")
            assertEquals(Role.USER, chat.messages[1].role)
            checkFed(chat, session, codec.format, codec)
        }
    }

    @Test
    fun `a question before calls can be edited, and the last question asked again after results`() {
        val session = replying(prompted, CALL, "so", CALL, "in", "the")
        val chat = conversation(session, prompted)
        chat.send("one").read()
        chat.sendResults(listOf(sunny)).read()
        for (index in listOf(1, 2, 3)) assertFailsWith<SessionException> { chat.sendAt(index, "x") }
        assertEquals(0, lastQuestion(chat.turns))
        chat.sendAt(0, "one").read()
        assertEquals(2, chat.turns.size)
        chat.sendResults(listOf(sunny)).read()
        chat.sendAt(0, "two").read()
        assertEquals(listOf("two", "the"), chat.turns.map { it.content })
        checkFed(chat, session, prompted.format, prompted)
    }

    @Test
    fun `saved chats keep calls and results, and those of earlier versions are read`() {
        val chats = SavedChats(folder)
        val arguments = parseJson("""{"n": [1, 2.0, 12345678901234567890, 1e-7, "é😀\n"]}""") as JsonObject
        val call = Message(Role.ASSISTANT, "so", listOf(ToolCall("f", arguments), ToolCall("g", JsonObject(emptyMap()))), "thinking")
        val results = call.toolCalls.zip(listOf(arguments, JsonString("clear")), ::resultTurn)
        val chat = SavedChat("a", "tiny", ChatSettings(tools = EXAMPLE_TOOLS), listOf(Message(Role.USER, "one"), call) + results)
        chats.save(chat)
        val read = chats.load("a")
        assertEquals(chat, read)
        for (codec in listOf(prompted, gemma4)) { // a double would lose digits
            val (expected, actual) = listOf(chat, read).map { encodeChat(codec.tokenizer, codec.format, it.messages, tools) }
            assertContentEquals(expected, actual)
        }
        assertEquals("""{"n": [1, 2.0, 12345678901234567890, 1e-07, "é😀\n"]}""", read.messages[2].content)
        val file = File(folder, "a.json")
        file.writeText(
            """{"version": 1, "bundle": "tiny", "settings": {"system": "", "sampling": null, "thinking": false, "roll": false},
            "messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}], "forgotten": 0, "changed_ms": 5}""",
        )
        assertEquals(SavedChat("a", "tiny", messages = listOf(Message(Role.USER, "one"), Message(Role.ASSISTANT, "two")), changedMs = 5), chats.load("a"))
        file.writeText(chat.json().write().replace("\\\"n\\\"", "n"))
        assertContains(assertFailsWith<StorageException> { chats.load("a") }.message.orEmpty(), "arguments")
    }

    @Test
    fun `tools that are none are refused by place`() {
        assertTrue(Tools.parse(" \n").isEmpty)
        assertEquals(setOf("get_weather", "current_time"), tools.names)
        assertEquals(Tools.parse("""[{"name": "f"}]"""), Tools.parse("""[{"type": "function", "function": {"name": "f"}}]"""))
        val refused = mapOf(
            "[" to "the tools are not JSON", "{}" to "the tools are {}, expected a list", "[1]" to "tool 1 has no name",
            """[{"name": "f"}, {"name": 1}]""" to "tool 2 has no name", """[{"function": 1}]""" to "tool 1 has no name",
            "[".repeat(200) to "nesting deeper than 128 levels",
        )
        for ((text, message) in refused) assertContains(assertFailsWith<SchemaException>(text) { Tools.parse(text) }.message.orEmpty(), message)
    }

    @Test
    fun `a model that can't be given tools refuses them, and chats that have calls`() {
        val without = prompted.copy(format = prompted.format.copy(tools = null))
        assertTrue(prompted.canCall && !without.canCall)
        val earlier = json(File(TINY, "chat.json")).value as JsonObject // bundles of an earlier version don't say
        assertNull(ChatFormat.parse(JsonObject(earlier.fields - "tools").write()).tools)
        val error = assertFailsWith<TokenizerException> { conversation(replying(without), without) }
        assertContains(error.message.orEmpty(), "this bundle can't be given tools")
        val called = listOf(Message(Role.USER, "a"), Message(Role.ASSISTANT, "", listOf(ToolCall("f", JsonObject(emptyMap())))))
        val chat = Conversation(replying(without), without, Sampler(Sampling()), earlier = called)
        assertFailsWith<TokenizerException> { chat.send("b") }
    }

    @Test
    fun `a schema that Gemma 4's template would garble is refused by name`() {
        fun property(text: String) = """[{"name": "f", "parameters": {"type": "object", "properties": {"a": $text}}}]"""
        val refused = mapOf(
            property("""{"type": ["string", "null"]}""") to "\"type\"", property("""{"type": "string", "description": 7}""") to "\"description\"",
            property("""{"type": "object", "required": "a"}""") to "\"required\"", """[{"name": "f", "description": null}]""" to "\"description\"",
            """[{"name": "f", "parameters": []}, {"name": "g", "parameters": 1}]""" to "the tool g has \"parameters\": 1",
        )
        for ((text, message) in refused) {
            assertContains(assertFailsWith<SchemaException>(text) { gemma4.check(Tools.parse(text)) }.message.orEmpty(), message)
            prompted.check(Tools.parse(text)) // there it is JSON
        }
    }

    @Test
    fun `calls that the app answers are answered five times in a row, and others left open`() {
        val call = """{"name": "current_time", "parameters": {}}"""
        fun answer(vararg replies: String): Pair<Conversation, Int> {
            val chat = conversation(replying(prompted, *replies), prompted)
            chat.send("when?").read()
            var answered = 0
            runBlocking {
                answerBuiltIn(chat, { JsonString("noon").takeIf { _ -> it.name == "current_time" } }) { reply ->
                    answered++
                    reply.pieces.toList()
                }
            }
            return chat to answered
        }
        val (chat, answered) = answer(call, call, "it is")
        assertEquals(2, answered)
        assertEquals(listOf("when?", "", "noon", "", "noon", "it is"), chat.turns.map { it.content })
        assertEquals(5, answer(*Array(7) { call }).second)
        val (open, none) = answer("[$call, $CALL]")
        assertEquals(0 to 2, none to openCalls(open.turns).size)
        assertEquals(0, answer("in").second)
    }

    @Test
    fun `the app answers one tool itself, and shows calls below the text`() {
        val call = ToolCall("current_time", JsonObject(emptyMap()))
        val time = builtInResult(call, Date(1_796_000_000_000), TimeZone.getTimeZone("Asia/Kolkata"))
        assertEquals("""{"time": "2026-11-30T06:23:20+05:30", "weekday": "Monday", "zone": "Asia/Kolkata"}""", time?.pythonJson())
        assertNull(builtInResult(call.copy(name = "get_weather"), Date(0), TimeZone.getDefault()))
        assertEquals(JsonString("it is"), parseResult("it is"))
        assertEquals(sunny, parseResult(" {\"sky\": \"clear\"} "))
        assertEquals("the\n\nCalls a tool:\n\n```\ncurrent_time()\n```", shownReply("the", listOf(call)))
        assertEquals("Calls 2 tools:\n\n```\ncurrent_time()\ncurrent_time()\n```", shownReply("", listOf(call, call)))
        assertEquals("the", shownReply("the", emptyList()))
    }
}
