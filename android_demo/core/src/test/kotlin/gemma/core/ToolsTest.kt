package gemma.core

import java.io.File
import java.util.Locale
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

    /** Digits were those of the phone's language. */
    @Test
    fun `numbers and texts are the same in every language`() {
        val before = Locale.getDefault()
        try {
            Locale.setDefault(Locale.forLanguageTag("ar-EG"))
            val written = listOf("1e-7", "1.5e+100", "12.25", "\"\\u0012\"").map { parseJson(it).pythonJson() }
            assertEquals(listOf("1e-07", "1.5e+100", "12.25", "\"\\u0012\""), written)
        } finally {
            Locale.setDefault(before)
        }
    }

    /** Below a power of two, numbers are closer together than above it. */
    @Test
    fun `powers of two have the fewest digits that give them again`() {
        assertEquals("5.960464477539063e-08", pythonNumber(JsonNumber(Math.scalb(1.0, -24))))
        assertEquals("-5.684341886080802e-14", pythonNumber(JsonNumber(-Math.scalb(1.0, -44))))
        fun digits(text: String) = text.substringBefore('e').substringBefore('E').filter { it in '0'..'9' }.trim('0').length
        for (exponent in -1000..999) {
            val value = Math.scalb(1.0, exponent)
            val text = pythonNumber(JsonNumber(value))
            assertEquals(value, text.toDouble(), text)
            assertTrue(digits(text) <= digits(value.toString()), text)
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
    if (role == Role.TOOL) return resultTurn(ToolCall(json.of("name").string(), JsonObject(emptyMap())), json.of("result").value)
    return Message(role, json.of("content").string(), calls, json.orNull("thought")?.string().orEmpty())
}
