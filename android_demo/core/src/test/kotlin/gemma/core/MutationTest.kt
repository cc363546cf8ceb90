package gemma.core

import org.junit.Assert
import java.io.ByteArrayInputStream
import java.io.ByteArrayOutputStream
import java.io.File
import java.lang.management.ManagementFactory
import java.nio.file.Files
import java.util.zip.ZipEntry
import java.util.zip.ZipOutputStream
import kotlin.random.Random
import kotlin.test.AfterTest
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertTrue

/**
 * Mutated bundles by the thousand. Each file is read or refused in one line, with bounded processor time and memory.
 * The seed is fixed, so a failure comes again.
 */
class MutationTest {
    private val root = Files.createTempDirectory("mutations").toFile()
    private val random = Random(7)
    private val threads = ManagementFactory.getThreadMXBean() as com.sun.management.ThreadMXBean
    private var read = 0
    private var refused = 0

    @AfterTest
    fun remove() {
        root.deleteRecursively()
    }

    private fun tiny(name: String) = File(TINY, name).readBytes()

    /** Gives mutations of a file to its reader; both outcomes must come, or the mutations are too weak or too strong. */
    private fun attack(whole: ByteArray, count: Int, mutate: (ByteArray) -> ByteArray, reader: (ByteArray) -> Unit) {
        reader(whole)
        val before = read to refused
        repeat(count) { round ->
            val file = mutate(whole)
            val allocated = threads.getThreadAllocatedBytes(Thread.currentThread().id)
            val started = threads.currentThreadCpuTime
            try {
                reader(file)
                read++
            } catch (error: GemmaException) {
                refused++
                assertEquals(oneLine(error.message.orEmpty()), error.message)
            } catch (error: Throwable) {
                throw AssertionError("mutation $round: $error in ${String(file, Charsets.ISO_8859_1).take(4000)}", error)
            }
            val bytes = threads.getThreadAllocatedBytes(Thread.currentThread().id) - allocated
            assertTrue(bytes <= MOST_BYTES + MOST_PER_BYTE * file.size, "mutation $round of ${file.size} bytes took $bytes bytes")
            val seconds = (threads.currentThreadCpuTime - started) / 1e9
            assertTrue(seconds <= MOST_SECONDS, "mutation $round took $seconds seconds of a processor")
        }
        Assert.assertNotEquals("none was read", before.first, read)
        Assert.assertNotEquals("none was refused", before.second, refused)
    }

    private fun bytes(file: ByteArray) = damaged(file, random)

    private fun numbers(file: ByteArray) = withNumber(file, random)

    private fun values(json: ByteArray): ByteArray {
        val value = parseJson(String(json, Charsets.UTF_8))
        return (0..random.nextInt(3)).fold(value) { it, _ -> it.altered(random) }.write().toByteArray()
    }

    @Test
    fun `manifests`() {
        val folder = File(root, "bundle").also { TINY.copyRecursively(it) }
        fun use(file: ByteArray) {
            File(folder, MANIFEST).writeBytes(file)
            val bundle = Bundle(folder, Manifest.parse(String(file, Charsets.UTF_8)))
            useManifest(bundle)
            openBundle(folder)
        }
        attack(tiny(MANIFEST), 700, ::bytes, ::use)
        attack(tiny(MANIFEST), 1500, ::values, ::use)
    }

    /** What the app does with a manifest, but for the model. */
    private fun useManifest(bundle: Bundle) {
        val manifest = bundle.manifest
        memoryProblem(manifest, 1L shl 33)
        Workload.of(manifest.contextLength)
        ChatSettings().samplingFor(manifest)
        checkRuntime("it", "1.29.0", manifest.target.minRuntimeVersion)
        val graph = bundle.graph("decode")
        graph.returnedCaches()
        graph.tensor(TensorRole.LOGITS)
        val session = EngineSession(Zeros(minOf(manifest.vocabSize, 1000)), manifest)
        session.prefill(IntArray(30))
        session.score(IntArray(40))
        session.undoable(16)
        session.rewind(20)
    }

    @Test
    fun `tokenizers`() {
        for (path in listOf(File(TINY, "tokenizer.gtok"), File(DATA, "gemma4/tokenizer.gtok"))) {
            fun use(file: ByteArray) {
                val tokenizer = Tokenizer.parse(file)
                tokenizer.decode(tokenizer.encodeTemplate("<bos><start_of_turn>user\n\n<mask> é😀 <|channel>the user"))
                tokenizer.decode(IntArray(400) { it - 2 })
            }
            attack(path.readBytes(), 1500, ::bytes, ::use)
            attack(path.readBytes(), 1500, ::numbers, ::use)
        }
    }

    @Test
    fun `chat formats`() {
        val turns = listOf(Message(Role.SYSTEM, "be brief"), Message(Role.USER, "the"), Message(Role.ASSISTANT, "a</think>b"), Message(Role.USER, "us"))
        for (folder in listOf(TINY, File(DATA, "gemma4"))) {
            val tokenizer = Tokenizer.parse(File(folder, "tokenizer.gtok").readBytes())
            fun use(file: ByteArray) {
                val format = ChatFormat.parse(String(file, Charsets.UTF_8))
                for (one in listOfNotNull(format, format.thinking)) {
                    encodeChat(tokenizer, one, turns)
                    encodeChat(tokenizer, one, turns.dropLast(1) + Message(Role.USER, "us"), Tools.parse(EXAMPLE_TOOLS))
                }
            }
            attack(File(folder, "chat.json").readBytes(), 1500, ::bytes, ::use)
            attack(File(folder, "chat.json").readBytes(), 1500, ::values, ::use)
        }
    }

    @Test
    fun `tools`() {
        for (codec in listOf(gemma4Codec(), gemma4Codec().let { it.copy(format = it.format.copy(tools = ToolFormat("tools:", null))) })) {
            fun use(file: ByteArray) {
                val tools = Tools.parse(String(file, Charsets.UTF_8))
                codec.check(tools)
                encodeChat(codec.tokenizer, codec.format, listOf(Message(Role.USER, "the")), tools)
            }
            attack(EXAMPLE_TOOLS.toByteArray(), 700, ::bytes, ::use)
            attack(EXAMPLE_TOOLS.toByteArray(), 700, ::values, ::use)
        }
    }

    /** Of replies nothing is refused: what is no call is text. */
    @Test
    fun `calls in replies`() {
        val marks = gemma4Codec().format.tools?.marks
        val json = """in ```json\n[{"name": "f", "parameters": {"a": [1, {"b": 2.5}]}}, {"name": "f"}]\n``` the"""
        val marked = "<|tool_call>call:f{a:<|\"|>the<|\"|>,b:[1,{c:null}]}<tool_call|> in <|tool_call>call:f{}<tool_call|>"
        for (whole in listOf(json, marked, "[".repeat(2000), "<|tool_call>call:f{a:" + "[".repeat(2000), "```\n".repeat(500), marked.repeat(50))) {
            repeat(300) {
                val text = String(bytes(whole.toByteArray()), Charsets.UTF_8)
                val found = findCalls(text, setOf("f"), marks)
                if (found.calls.isEmpty()) assertEquals(text, found.text)
                found.calls.forEach { call -> parseJson(call.arguments.pythonJson()) }
            }
        }
    }

    @Test
    fun `saved chats`() {
        val call = Message(Role.ASSISTANT, "", listOf(ToolCall("f", parseJson("""{"a": [1, 2.0]}""") as JsonObject)), "thought")
        val turns = listOf(Message(Role.USER, "the"), call, resultTurn(call.toolCalls[0], JsonString("in")), Message(Role.ASSISTANT, "us"))
        val whole = SavedChat("a", "tiny", ChatSettings(tools = EXAMPLE_TOOLS), turns).json().write().toByteArray()
        fun use(file: ByteArray) {
            SavedChat.read("a", JsonFields.parse("a.json", String(file, Charsets.UTF_8)))
        }
        attack(whole, 500, ::bytes, ::use)
        attack(whole, 500, ::values, ::use)
    }

    @Test
    fun `goldens`() {
        fun use(file: ByteArray) {
            for (golden in parseGoldens(String(file, Charsets.UTF_8))) {
                val rows = List(golden.judged) { FloatArray(376) }
                compareLogits(rows, golden.quantized)
                compareLogits(rows, golden.reference)
            }
        }
        attack(tiny("goldens.json"), 100, ::bytes, ::use)
        attack(tiny("goldens.json"), 150, ::values, ::use)
    }

    @Test
    fun `grammars`() {
        for (case in (parseJson(File(DATA, "grammar_vectors.json").readText()) as JsonArray).items.take(3)) {
            val text = ((case.field("texts") as JsonArray).items.first().field("text") as JsonString).text.toByteArray()
            fun use(file: ByteArray) {
                val grammar = ByteGrammar.parse(String(file, Charsets.UTF_8))
                var state = grammar.start
                for (byte in text) { // as the app asks: for every byte that may come, then for the one that does
                    for (other in 0..255) grammar.mayEnd(grammar.after(state, other))
                    state = grammar.after(state, byte.toInt() and 0xFF)
                }
            }
            val whole = case.field("grammar").write().toByteArray()
            attack(whole, 500, ::bytes, ::use)
            attack(whole, 500, ::values, ::use)
        }
    }

    @Test
    fun `archives`() {
        val library = BundleLibrary(File(root, "library")) { 250_000_000 }
        fun use(archive: ByteArray) = library.delete(library.importZip("tiny", ByteArrayInputStream(archive)))
        for (method in listOf(ZipEntry.STORED, ZipEntry.DEFLATED)) {
            val whole = zipOf(TINY.listFiles().orEmpty().sorted().map { it.name to it.readBytes() }, method)
            attack(whole, 150, ::bytes, ::use)
            attack(whole, 150, ::numbers, ::use)
        }
        assertEquals(emptyList(), File(root, "library").list().orEmpty().toList())
    }

    /** Whole archives whose manifest is hostile: names, sizes and digests of files. */
    @Test
    fun `archives with other manifests`() {
        val library = BundleLibrary(File(root, "library")) { 250_000_000 }
        val files = TINY.listFiles().orEmpty().filter { it.name != MANIFEST }.map { it.name to it.readBytes() }
        attack(tiny(MANIFEST), 300, ::values) { manifest ->
            val archive = zipOf(files + (MANIFEST to manifest), ZipEntry.STORED)
            library.delete(library.importZip("tiny", ByteArrayInputStream(archive)))
        }
        assertEquals(emptyList(), File(root, "library").list().orEmpty().toList())
        assertEquals(listOf("library"), root.list().orEmpty().toList())
    }

    @Test
    fun `an error is one line of printable characters, whatever it quotes`() {
        assertEquals("a b \\u202ec\\u0000", oneLine(" a\n\t b\u2028\u202ec\u0000 "))
        assertEquals("é😀日本", oneLine("é😀日本"))
        assertEquals(1503, oneLine("x".repeat(100_000)).length)
        assertEquals("no \\u001b[31m", SessionException("no\n\u001b[31m").message)
    }

    private companion object {
        const val MOST_BYTES = 32L shl 20 // that a reader allocates in all, and
        const val MOST_PER_BYTE = 100 // for each byte of its file
        const val MOST_SECONDS = 5.0
    }
}

/** An engine of a model that always gives the same logits. */
private class Zeros(private val vocabSize: Int) : Engine {
    override val givesEveryRow = true
    override val runtime = "zeros"
    override val threads: Int? = null

    override fun run(tokens: IntArray, position: Int, rows: Int) = List(rows) { FloatArray(vocabSize) }

    override fun close() = Unit
}

private fun zipOf(files: List<Pair<String, ByteArray>>, method: Int): ByteArray {
    val out = ByteArrayOutputStream()
    ZipOutputStream(out).use { zip ->
        for ((name, content) in files) {
            val entry = ZipEntry("tiny/$name")
            entry.method = method
            entry.size = content.size.toLong()
            entry.crc = java.util.zip.CRC32().also { it.update(content) }.value
            zip.putNextEntry(entry)
            zip.write(content)
        }
    }
    return out.toByteArray()
}

/** The bytes with a number that sizes and counts are wrong with, of 1 to 8 bytes, mostly near the beginning or the end. */
private fun withNumber(whole: ByteArray, random: Random): ByteArray {
    val bytes = whole.copyOf()
    val width = listOf(1, 2, 4, 8).random(random)
    val reach = minOf(bytes.size - width, if (random.nextInt(4) == 0) Int.MAX_VALUE else 1100)
    val at = random.nextInt(reach + 1).let { if (random.nextBoolean()) it else bytes.size - width - it }
    val value = listOf(0L, 1L, -1L, Long.MAX_VALUE, Int.MAX_VALUE.toLong(), 1L shl 31, 1L shl 16, 0x7FL, 0x80L, random.nextLong()).random(random)
    for (index in 0 until width) bytes[at + index] = (value shr (8 * index)).toByte()
    return bytes
}

private val HOSTILE: List<Json> = listOf(
    0.0, -1.0, 1.0, 0.5, 7.0, 73.0, 2147483647.0, 2147483648.0, 4294967296.0, 9007199254740992.0, 9007199254740994.0, 1e308, -1e308, 5e-324,
).map(::JsonNumber) + listOf(
    "", "x", "../x", "/etc/hostname", "a\u0000b", "a\nb\u202e", "é".repeat(2000), "x".repeat(300), "local", "global", "decode", "model.onnx",
    MANIFEST, "float32", "tokens", "logits", "99999999999.1", "<bos>", "%s",
).map(::JsonString) + listOf(
    JsonNull, JsonBoolean(true), JsonBoolean(false), JsonArray(emptyList()), JsonObject(emptyMap()),
    (0 until 100).fold<Int, Json>(JsonNull) { inner, _ -> JsonArray(listOf(inner)) },
)

/** The value with one part replaced, left out, repeated or renamed. */
private fun Json.altered(random: Random): Json = when {
    this is JsonObject && fields.isNotEmpty() && random.nextInt(10) > 0 -> {
        val name = fields.keys.random(random)
        when (random.nextInt(12)) {
            0 -> JsonObject(fields - name)
            1 -> JsonObject(fields - name + (listOf("", "../$name", "a/b", "x\n", "exact").random(random) to fields.getValue(name)))
            else -> JsonObject(fields + (name to fields.getValue(name).altered(random)))
        }
    }
    this is JsonArray && items.isNotEmpty() && random.nextInt(10) > 0 -> {
        val at = random.nextInt(items.size)
        when (random.nextInt(12)) {
            0 -> JsonArray(items.filterIndexed { index, _ -> index != at })
            1 -> JsonArray(items + List(random.nextInt(40)) { items[at] })
            else -> JsonArray(items.mapIndexed { index, item -> if (index == at) item.altered(random) else item })
        }
    }
    else -> HOSTILE.random(random)
}

/** The bytes with one to three damages: a byte changed, a range removed, the end cut off, or a range repeated. */
private fun damaged(whole: ByteArray, random: Random): ByteArray {
    val bytes = whole.toMutableList()
    repeat(1 + random.nextInt(3)) {
        val at = random.nextInt(if (random.nextBoolean()) bytes.size else minOf(bytes.size, 64))
        val end = minOf(bytes.size, at + 1 + random.nextInt(20))
        when (random.nextInt(4)) {
            0 -> bytes[at] = random.nextInt().toByte()
            1 -> bytes.subList(at, end).clear()
            2 -> bytes.subList(at, bytes.size).clear()
            else -> bytes.addAll(at, bytes.subList(at, end).toList())
        }
        if (bytes.isEmpty()) bytes += 0
    }
    return bytes.toByteArray()
}
