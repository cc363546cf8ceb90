package gemma.core

import org.junit.Assume.assumeTrue
import java.io.File
import kotlin.test.Test
import kotlin.test.assertContentEquals
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertNotNull
import kotlin.test.assertTrue

/** Checks results against those of the Python runtime. */
class VectorsTest {
    private val tokenizer = tinyTokenizer()

    @Test
    fun `encoding text gives Python's ids, and decoding gives Python's text`() = checkEncode(tokenizer, vectors.of("encode"))

    @Test
    fun `a user's text can't become a token around calls, which is not special`() {
        val tokenizer = Tokenizer.parse(File(DATA, "calls/tokenizer.gtok").readBytes())
        checkEncode(tokenizer, vectors.of("encode_calls"))
    }

    @Test
    fun `encoding a template gives Python's ids`() {
        vectors.of("encode_control").list { vector ->
            val text = vector.of("text").string()
            assertContentEquals(vector.of("ids").ints(), tokenizer.encodeTemplate(text), text)
        }
    }

    @Test
    fun `streamed tokens give Python's pieces`() = checkDecode(tokenizer, vectors.of("decode"))

    @Test
    fun `encoding conversations gives Python's ids`() {
        val format = ChatFormat.parse(File(TINY, "chat.json").readText())
        vectors.of("chat").list { vector ->
            val messages = messages(vector)
            assertContentEquals(vector.of("ids").ints(), encodeChat(tokenizer, format, messages), "$messages")
        }
    }

    @Test
    fun `Gemma 4's prompts are Python's, with thinking and without, and thoughts are told from answers`() {
        val gemma4 = File(DATA, "gemma4")
        val tokenizer = Tokenizer.parse(File(gemma4, "tokenizer.gtok").readBytes())
        val format = ChatFormat.parse(File(gemma4, "chat.json").readText())
        val expected = vectors.of("gemma4")
        expected.of("chat").list { vector ->
            val used = if (vector.of("thinking").boolean()) assertNotNull(format.thinking) else format
            assertContentEquals(vector.of("ids").ints(), encodeChat(tokenizer, used, messages(vector)), "$vector")
        }
        expected.of("thoughts").list { vector ->
            val stream = tokenizer.stream()
            val thoughts = Thoughts(tokenizer)
            val pieces = vector.of("ids").ints().map { thoughts.take(it, stream.push(it)) }
            assertEquals(vector.of("pieces").list { it.string() }, pieces)
            assertEquals(vector.of("flush").string(), thoughts.end(stream.flush()))
            assertEquals(vector.of("thought").string(), thoughts.text)
        }
        assertEquals("a the  in", format.withoutThoughts("a<|channel>thought\nno<channel|> the <channel|> in<|channel>x"))
    }

    @Test
    fun `the same noise samples Python's tokens`() {
        vectors.of("sampler").list { vector ->
            val sampling = readSampling(vector.of("sampling"))
            val noise = vector.of("noise").double()
            val logits = vector.of("logits").list { it.double().toFloat() }.toFloatArray()
            val token = Sampler(sampling) { noise }.pick(logits, vector.of("previous").ints().asList())
            assertEquals(vector.of("token").count(), token, "$sampling")
        }
    }

    @Test
    fun `the same seed samples Python's tokens`() {
        vectors.of("seeds").list { vector ->
            val seed = vector.of("seed").string().toLong()
            val noise = SeededNoise(seed)
            assertEquals(vector.of("noise").list { it.double() }, List(8) { noise() }, "seed $seed")
            val sampler = Sampler(readSampling(vector.of("sampling")), SeededNoise(seed))
            val logits = vector.of("logits").list { it.double().toFloat() }.toFloatArray()
            val tokens = vector.of("tokens").ints().asList()
            assertEquals(tokens, List(tokens.size) { sampler.pick(logits, emptyList()) }, "seed $seed")
        }
        assertFailsWith<SessionException> { SeededNoise(-1) }
    }

    @Test
    fun `Gemma 2's and 3's own tokenizers equal Python's on thousands of texts`() {
        val folder = System.getProperty("gemma.genuine")
        assumeTrue("the tokenizers of Gemma 2 and 3 are not available", folder != null)
        val vocabularies = File(folder!!).listFiles().orEmpty()
        assertEquals(2, vocabularies.size)
        for (vocabulary in vocabularies) {
            val tokenizer = Tokenizer.parse(File(vocabulary, "tokenizer.gtok").readBytes())
            val expected = json(File(vocabulary, "vectors.json"))
            checkEncode(tokenizer, expected.of("encode"), least = 4000)
            checkDecode(tokenizer, expected.of("decode"))
        }
    }
}

private fun messages(vector: JsonFields): List<Message> = vector.of("messages").list {
    Message(Role.valueOf(it.of("role").string().uppercase()), it.of("content").string())
}

private fun checkEncode(tokenizer: Tokenizer, expected: JsonFields, least: Int = 1) {
    val checked = expected.list { vector ->
        val text = vector.of("text").string()
        val ids = tokenizer.encode(text)
        assertContentEquals(vector.of("ids").ints(), ids, text)
        assertEquals(vector.of("decoded").string(), tokenizer.decode(ids))
    }
    assertTrue(checked.size >= least)
}

private fun checkDecode(tokenizer: Tokenizer, expected: JsonFields) {
    expected.list { vector ->
        val stream = tokenizer.stream()
        assertEquals(vector.of("pieces").list { it.string() }, vector.of("ids").ints().map(stream::push))
        assertEquals(vector.of("flush").string(), stream.flush())
    }
}
