package gemma.core

import java.io.Closeable

/** One loaded artifact and its KV caches. It knows token ids, not text. T new tokens, V vocabulary. */
interface Session : Closeable {
    /** Tokens in the caches. */
    val position: Int

    /** Tokens the caches can hold. */
    val contextLength: Int

    /** Appends tokens, in chunks; the logits after the last one, (V). Raises ContextFullException before it writes. */
    fun prefill(tokens: IntArray): FloatArray

    /** Appends one token; the logits after it, (V). */
    fun decode(token: Int): FloatArray

    /** Appends tokens; the logits after each of them, (T, V). */
    fun score(tokens: IntArray): List<FloatArray>

    /** Forgets every token. */
    fun reset()
}

/** What a backend has to do: run one chunk of at most `prefill_length` tokens. */
interface Engine : Closeable {
    /** Whether one call gives the logits of every position, or of the last alone. */
    val givesEveryRow: Boolean

    /** Appends tokens at a position; the logits after the last `rows` of them, (rows, V). */
    fun run(tokens: IntArray, position: Int, rows: Int): List<FloatArray>
}

/** A session over an engine: positions, chunks and checks. Slots past the position are never read. */
class EngineSession(private val engine: Engine, private val manifest: Manifest) : Session {
    override var position: Int = 0
        private set

    override val contextLength: Int get() = manifest.contextLength

    override fun prefill(tokens: IntArray): FloatArray {
        checkTokens(tokens)
        return chunks(tokens, manifest.prefillLength).map { run(it, 1) }.last().last()
    }

    override fun decode(token: Int): FloatArray = prefill(intArrayOf(token))

    override fun score(tokens: IntArray): List<FloatArray> {
        checkTokens(tokens)
        return chunks(tokens, if (engine.givesEveryRow) manifest.prefillLength else 1).flatMap { run(it, it.size) }
    }

    override fun reset() {
        position = 0
    }

    override fun close() = engine.close()

    private fun run(chunk: IntArray, rows: Int): List<FloatArray> {
        val logits = engine.run(chunk, position, rows)
        if (logits.size != rows || logits.any { it.size != manifest.vocabSize }) {
            throw SessionException(
                "the artifact gave ${logits.size} rows of ${logits.firstOrNull()?.size ?: 0} logits, expected $rows of " +
                    "${manifest.vocabSize}; export the model again",
            )
        }
        position += chunk.size
        return logits
    }

    private fun checkTokens(tokens: IntArray) {
        if (tokens.isEmpty()) throw SessionException("no tokens given; a prompt needs at least one (the bos token)")
        tokens.firstOrNull { it !in 0 until manifest.vocabSize }?.let {
            throw SessionException("token $it is outside the vocabulary of ${manifest.vocabSize}; check the bundle's tokenizer")
        }
        checkRoom(position, tokens.size, contextLength)
    }
}

/**
 * A session that can put its artifact aside for another of the bundle's graphs, so that two are never in
 * memory together.
 */
class BundleSession(private val manifest: Manifest, private val open: (graph: String) -> Engine) : Session {
    private var loaded: EngineSession? = EngineSession(open(SHIPPED), manifest)

    override val position: Int get() = session().position

    override val contextLength: Int get() = manifest.contextLength

    override fun prefill(tokens: IntArray): FloatArray = session().prefill(tokens)

    override fun decode(token: Int): FloatArray = session().decode(token)

    override fun score(tokens: IntArray): List<FloatArray> = session().score(tokens)

    override fun reset() {
        loaded?.reset()
    }

    /** Works with another graph; then the shipped one is loaded anew, with empty caches. */
    fun <T> withGraph(name: String, work: (Session) -> T): T {
        close()
        try {
            return EngineSession(open(name), manifest).use(work)
        } finally {
            loaded = EngineSession(open(SHIPPED), manifest)
        }
    }

    override fun close() {
        loaded?.close()
        loaded = null
    }

    private fun session(): EngineSession =
        loaded ?: throw SessionException("the model is not in memory any more; load its bundle again")

    private companion object {
        const val SHIPPED = "decode"
    }
}

/** Raises ContextFullException if `new` tokens don't fit behind `position` of them. */
fun checkRoom(position: Int, new: Int, contextLength: Int) {
    if (position + new > contextLength) {
        throw ContextFullException(
            "$position tokens are in the cache and $new more would pass the context of $contextLength; " +
                "start a new chat, or export with a larger --context",
        )
    }
}

/** Raises SessionException if the app's runtime is older than the bundle needs. */
fun checkRuntime(library: String, installed: String, minimum: String) {
    val pairs = versionOf(installed).zip(versionOf(minimum))
    val different = pairs.firstOrNull { it.first != it.second } ?: return
    if (different.first < different.second) {
        throw SessionException(
            "$library $installed would give wrong tokens, this bundle needs $minimum; update the app's library",
        )
    }
}

private fun versionOf(text: String): List<Int> = text.split('.', '+', '-').map { it.toIntOrNull() ?: 0 } + listOf(0, 0, 0)

private fun chunks(tokens: IntArray, length: Int): List<IntArray> =
    tokens.indices.step(length).map { tokens.copyOfRange(it, minOf(it + length, tokens.size)) }
