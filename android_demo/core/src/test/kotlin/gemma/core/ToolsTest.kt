package gemma.core

import java.io.File
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertNotNull
import kotlin.test.assertTrue

internal val toolVectors: JsonFields by lazy { json(File(DATA, "tool_vectors.json")) }

/** Checks tools against the results of the Python runtime. */
class ToolsTest {
    private val formats = toolVectors.of("formats").map(ChatFormat::read)
    private val tokenizers = mapOf("gemma4" to gemma4Codec().tokenizer).withDefault { tinyTokenizer() }

    @Test
    fun `numbers are written as Python writes them`() {
        toolVectors.of("numbers").list { vector ->
            val text = vector.of("json").string()
            assertEquals(vector.of("python").string(), parseJson(text).pythonJson(), text)
        }
    }

    @Test
    fun `tools are written into the documented prompt as Python does`() {
        val prompt = assertNotNull(formats.getValue("gemma2").tools?.prompt)
        toolVectors.of("prompts").list { vector ->
            val turns = withoutTools(listOf(Message(Role.USER, "in")), Tools.parse(vector.of("tools").string()), prompt)
            assertEquals(vector.of("text").string(), turns[0].content)
        }
    }

    @Test
    fun `chats with tools give Python's ids, also where names of control tokens are in tools, calls and results`() {
        val checked = toolVectors.of("chats").list { vector ->
            val name = vector.of("format").string()
            val plain = formats.getValue(name)
            val format = if (vector.of("thinking").boolean()) assertNotNull(plain.thinking) else plain
            val ids = encodeChat(tokenizers.getValue(name), format, vector.of("messages").list(::message), Tools.parse(vector.of("tools").string()))
            assertContentEquals(vector.of("ids").ints(), ids, vector.of("messages").toString())
        }
        assertTrue(checked.size > 90)
    }

    @Test
    fun `the calls in replies are those that Python finds`() {
        toolVectors.of("replies").list { vector ->
            val text = vector.of("text").string()
            val found = findCalls(text, setOf("f", "g"), formats.getValue(vector.of("format").string()).tools?.marks)
            assertEquals(vector.of("rest").string(), found.text, text)
            val calls = vector.of("calls").list { it.of("name").string() to it.of("arguments").string() }
            assertEquals(calls, found.calls.map { it.name to it.arguments.pythonJson() }, text)
        }
    }
}

/** A turn of the vectors, where calls and results are JSON values. */
private fun message(json: JsonFields): Message {
    val calls = json.orNull("calls")?.list { ToolCall(it.of("name").string(), it.of("arguments").value as JsonObject) }.orEmpty()
    val role = Role.valueOf(json.of("role").string().uppercase())
    if (role == Role.TOOL) return resultOf(ToolCall(json.of("name").string(), JsonObject(emptyMap())), json.of("result").value)
    return Message(role, json.of("content").string(), calls, json.orNull("thought")?.string().orEmpty())
}
