package gemma.core

import org.junit.Assume.assumeTrue
import java.io.File
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertTrue

/** What Python says, this says too. */
class VectorsTest {
    private val tokenizer = tinyTokenizer()

    @Test
    fun `text becomes Python's ids and comes back`() = checkEncode(tokenizer, vectors.of("encode"))

    @Test
    fun `a template's text becomes Python's ids`() {
        vectors.of("encode_control").list { vector ->
            val text = vector.of("text").string()
            assertContentEquals(vector.of("ids").ints(), tokenizer.encodeTemplate(text), text)
        }
    }

    @Test
    fun `tokens stream into Python's characters`() = checkDecode(tokenizer, vectors.of("decode"))

    @Test
    fun `conversations become Python's ids`() {
        val format = ChatFormat.parse(File(TINY, "chat.json").readText())
        vectors.of("chat").list { vector ->
            val messages = vector.of("messages").list {
                Message(Role.valueOf(it.of("role").string().uppercase()), it.of("content").string())
            }
            assertContentEquals(vector.of("ids").ints(), encodeChat(tokenizer, format, messages, 2), "$messages")
        }
    }

    @Test
    fun `the same noise draws Python's tokens`() {
        vectors.of("sampler").list { vector ->
            val sampling = readSampling(vector.of("sampling"))
            val noise = vector.of("noise").double()
            val logits = vector.of("logits").list { it.double().toFloat() }.toFloatArray()
            val drawn = Sampler(sampling) { noise }.pick(logits, vector.of("previous").ints().asList())
            assertEquals(vector.of("token").count(), drawn, "$sampling")
        }
    }

    @Test
    fun `the genuine tokenizers are equal on thousands of texts`() {
        val folder = System.getProperty("gemma.genuine")
        assumeTrue("the genuine tokenizers of Gemma 2 and 3 are not here", folder != null)
        val vocabularies = File(folder!!).listFiles().orEmpty()
        assertEquals(2, vocabularies.size)
        for (vocabulary in vocabularies) {
            val genuine = Tokenizer.parse(File(vocabulary, "tokenizer.gtok").readBytes())
            val said = json(File(vocabulary, "vectors.json"))
            checkEncode(genuine, said.of("encode"), least = 4000)
            checkDecode(genuine, said.of("decode"))
        }
    }

    private fun readSampling(json: JsonFields) = Sampling(
        temperature = json.of("temperature").double(),
        topK = json.of("top_k").count(),
        topP = json.of("top_p").double(),
        minP = json.of("min_p").double(),
        repetitionPenalty = json.of("repetition_penalty").double(),
    )
}

private fun checkEncode(tokenizer: Tokenizer, said: JsonFields, least: Int = 1) {
    val checked = said.list { vector ->
        val text = vector.of("text").string()
        val ids = tokenizer.encode(text)
        assertContentEquals(vector.of("ids").ints(), ids, text)
        assertEquals(vector.of("decoded").string(), tokenizer.decode(ids))
    }
    assertTrue(checked.size >= least)
}

private fun checkDecode(tokenizer: Tokenizer, said: JsonFields) {
    said.list { vector ->
        val stream = tokenizer.stream()
        assertEquals(vector.of("pieces").list { it.string() }, vector.of("ids").ints().map(stream::push))
        assertEquals(vector.of("flush").string(), stream.flush())
    }
}
