package gemma.core

import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import org.junit.Assume.assumeTrue
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.util.Base64
import kotlin.test.assertEquals
import kotlin.test.assertNotNull

/** The folder `tests/data` of the repository. */
val DATA = File(System.getProperty("gemma.data") ?: "../../tests/data")
val TINY = File(DATA, "tiny")

internal fun json(path: File): JsonFields = JsonFields.parse(path.name, path.readText())

internal val vectors: JsonFields by lazy { json(File(DATA, "phone_vectors.json")) }

internal fun JsonFields.ints(): IntArray = list { it.count() }.toIntArray()

fun tinyTokenizer(): Tokenizer = Tokenizer.parse(File(TINY, "tokenizer.gtok").readBytes())

/** Of a Gemma 4, which thinks; 5 ends its replies. */
internal fun gemma4Codec(): ChatCodec {
    val folder = File(DATA, "gemma4")
    val tokenizer = Tokenizer.parse(File(folder, "tokenizer.gtok").readBytes())
    return ChatCodec(tokenizer, ChatFormat.parse(File(folder, "chat.json").readText()), setOf(5))
}

internal fun checkFigures(expected: JsonFields, actual: Agreement) {
    assertEquals(expected.of("positions").count(), actual.positions)
    assertEquals(expected.of("near_ties").count(), actual.nearTies)
    assertEquals(expected.of("top1").double(), actual.top1, 1e-9)
    val figures = mapOf(
        "max_abs" to actual.maxAbs, "mean_abs" to actual.meanAbs, "mean_kl" to actual.meanKl, "p99_kl" to actual.p99Kl,
    )
    for ((name, value) in figures) {
        val figure = expected.of(name).double()
        assertEquals(figure, value, 1e-3 * figure + 1e-5, name)
    }
}

/** The shared JSON has the field names of `gemma-runtime verify --json` and `bench --json`. */
internal fun checkReport(bundle: Bundle, verification: Verification, benchmark: Benchmark) {
    val sustained = Sustained(1.0, 8, 4, 80, listOf(Span(5.0, 16.0, Condition("light", 123)), Span(10.0, 8.0, Condition(null, null))))
    val report = reportJson(mapOf("name" to "JVM"), bundle, verification, Loading(1.0, 2.0), benchmark, sustained, 1)
    assertEquals(report, parseJson(report.write()))
    val names = vectors.of("fields").map { part -> part.list { it.string() } }
    val verify = report.field("verify")
    assertEquals(names.getValue("Verification"), verify.names())
    assertEquals(names.getValue("Limits"), verify.field("limits").names())
    assertEquals(names.getValue("Agreement"), verify.field("lowering").names())
    assertEquals(loadGoldens(bundle).map { it.name }, verify.field("by_golden").names())
    val bench = report.field("bench")
    val figures = (bench.field("bundles") as JsonArray).items.single()
    val prompt = (figures.field("prompts") as JsonArray).items.first()
    assertEquals(emptyList(), bench.names() - names.getValue("Benchmark").toSet())
    assertEquals(emptyList(), figures.names() - names.getValue("BundleFigures").toSet())
    assertEquals(names.getValue("PromptFigures"), prompt.names())
    assertEquals(names.getValue("Spread"), figures.field("token_ms").names())
    assertEquals(bundle.digest(), (report.field("digest") as JsonString).text)
    val recorded = parseJson(File(DATA, "report/phone.json").readText())
    for (part in listOf<Json.() -> Json>({ this }, { field("sustained") }, { (field("sustained").field("spans") as JsonArray).items.first() })) {
        assertEquals(recorded.part().names(), report.part().names(), "as in the report that gemma-runtime report is tested with")
    }
}

/** An answer in an earlier place equals that of a new conversation with the same messages, whether or not the caches go back. */
fun checkAnswersInEarlierPlaces(session: Session, codec: ChatCodec) {
    val positions = listOf(Triple(2, 2, "the user"), Triple(3, 2, "in the inn"), Triple(1, 0, "us")).map { (answers, place, edit) ->
        fun conversation(earlier: List<Message>) = Conversation(session, codec, Sampler(Sampling()), earlier = earlier)
        val chat = conversation(emptyList())
        repeat(answers) { chat.answer(2 * it, "in the inn, the user") }
        val before = chat.turns
        val reply = chat.sendAt(place, edit, 4)
        val position = session.position // before any of the new tokens is fed
        runBlocking { reply.pieces.toList() }
        val fresh = conversation(before.take(place))
        assertEquals(fresh.answer(place, edit).tokens, reply.tokens)
        assertEquals(fresh.turns, chat.turns)
        val again = chat.answer(assertNotNull(lastQuestion(chat.turns)), edit)
        assertEquals(reply.tokens, again.tokens, "the same question once more, greedily")
        assertEquals(fresh.turns, chat.turns)
        position
    }
    assertEquals(listOf(true, false, true), positions.map { it > 0 }, "$positions")
}

fun Conversation.answer(index: Int, text: String): Reply = runBlocking { sendAt(index, text, 4).also { it.pieces.toList() } }

internal fun Json.field(name: String): Json = (this as JsonObject).fields.getValue(name)

private fun Json.names(): List<String> = (this as JsonObject).fields.keys.toList()

/** A session without a model: `script` returns the next token for the tokens so far. */
class ScriptedSession(override val contextLength: Int = 4096, private val script: (List<Int>) -> Int) : Session {
    val tokens = ArrayList<Int>()
    val fed = ArrayList<List<Int>>() // the tokens of each call
    override val position: Int get() = tokens.size

    override fun prefill(tokens: IntArray, beforeChunk: () -> Unit): FloatArray {
        checkRoom(position, tokens.size, contextLength)
        fed += tokens.asList()
        this.tokens += tokens.asList()
        return FloatArray(400).also { it[script(this.tokens)] = 1f }
    }

    override fun decode(token: Int): FloatArray = prefill(intArrayOf(token))

    override fun score(tokens: IntArray): List<FloatArray> = tokens.map(::decode)

    override val scoresTogether = true

    override fun undoable(most: Int): Int = most

    override fun rewind(to: Int): Int {
        tokens.subList(to, tokens.size).clear()
        return position
    }

    override fun reset() = tokens.clear()

    override fun close() = reset()
}

/** The Python runtime's session of the tiny bundle, in its own process. */
class BridgeEngine(private val vocabSize: Int, graph: String = "exact") : Engine {
    override val givesEveryRow = true
    override val runtime = "gemma_runtime"
    override val threads = 1
    private val process: Process

    init {
        val python = System.getProperty("gemma.python")
        assumeTrue("there is no Python with gemma_runtime to run the model", python != null)
        process = ProcessBuilder(
            python, "-m", "tests.data.session_bridge", TINY.path, "/dev/stdin", "/dev/stdout", "--$graph",
        ).redirectError(ProcessBuilder.Redirect.INHERIT).start()
    }

    private val questions = process.outputStream.bufferedWriter()
    private val answers = process.inputStream.bufferedReader()

    override fun run(tokens: IntArray, position: Int, rows: Int): List<FloatArray> {
        questions.write("$position $rows ${tokens.joinToString(" ")}\n")
        questions.flush()
        val answer = answers.readLine() ?: throw SessionException("the bridge ended")
        val floats = ByteBuffer.wrap(Base64.getDecoder().decode(answer)).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer()
        return List(rows) { FloatArray(vocabSize).also(floats::get) }
    }

    override fun close() {
        questions.close()
        process.waitFor()
    }
}
