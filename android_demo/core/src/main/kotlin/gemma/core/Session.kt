package gemma.core

import java.io.Closeable

/** A loaded artifact and its KV caches. It works on token ids, not text. T new tokens, V vocabulary. */
interface Session : Closeable {
    /** Tokens in the caches. */
    val position: Int

    /** Most tokens the caches can hold. */
    val contextLength: Int

    /**
     * Appends tokens in chunks; returns the logits after the last one, (V). Throws ContextFullException before it writes.
     *
     * Calls `beforeChunk` before each chunk; if it throws, the chunks before are in the caches.
     */
    fun prefill(tokens: IntArray, beforeChunk: () -> Unit = {}): FloatArray

    /** Appends one token; returns the logits after it, (V). */
    fun decode(token: Int): FloatArray

    /** Appends tokens; returns the logits after each of them, (T, V). */
    fun score(tokens: IntArray): List<FloatArray>

    /**
     * Goes back to a position, or to 0 where the caches no longer hold what it needs; returns the position now.
     * The logits that follow are exactly those of a session that was fed the tokens up to there in the same chunks.
     */
    fun rewind(to: Int): Int

    /** How many of the next `most` tokens can be fed and then taken back by `rewind`, with nothing fed again. */
    fun undoable(most: Int): Int

    /** Whether `score` runs the model once for several tokens, so that drafts can save time. */
    val scoresTogether: Boolean

    /** Forgets every token. */
    fun reset()
}

/** A backend: runs one chunk of at most `prefill_length` tokens. */
interface Engine : Closeable {
    /** Whether one call can return the logits of every position, or only of the last. */
    val givesEveryRow: Boolean

    /** The runtime and its version, for reports. */
    val runtime: String

    /** The threads that it computes with, for reports; null if the runtime decides. */
    val threads: Int?

    /** Appends tokens at a position; returns the logits after the last `rows` of them, (rows, V). */
    fun run(tokens: IntArray, position: Int, rows: Int): List<FloatArray>
}

/** A session over an engine: tracks the position, splits chunks, checks arguments. Slots past the position are never read. */
class EngineSession(private val engine: Engine, private val manifest: Manifest) : Session {
    override var position: Int = 0
        private set
    private var written = 0 // most tokens that were in the caches since they were empty

    override val contextLength: Int get() = manifest.contextLength

    override val scoresTogether: Boolean get() = engine.givesEveryRow

    val runtime: String get() = engine.runtime

    val threads: Int? get() = engine.threads

    override fun prefill(tokens: IntArray, beforeChunk: () -> Unit): FloatArray {
        checkTokens(tokens)
        var logits = FloatArray(0)
        for (chunk in chunks(tokens, manifest.prefillLength)) {
            beforeChunk()
            logits = run(chunk, 1).last()
        }
        return logits
    }

    override fun decode(token: Int): FloatArray = prefill(intArrayOf(token))

    override fun score(tokens: IntArray): List<FloatArray> {
        checkTokens(tokens)
        val pieces = if (engine.givesEveryRow) scoredChunks(tokens) else chunks(tokens, 1)
        return pieces.flatMap { run(it, it.size) }
    }

    /**
     * Chunks after which each shared ring still holds what all of their tokens attend to.
     *
     * The layer that owns a ring reads it before it drops tokens; one that shares it reads it afterwards. A ring that
     * has just been filled holds the window of every token since the time before, so chunks end there.
     */
    private fun scoredChunks(tokens: IntArray): List<IntArray> {
        val rings = manifest.layers.filter { it.source != null && it.slots < contextLength }
        val pieces = ArrayList<IntArray>()
        var start = 0
        while (start < tokens.size) {
            val room = rings.minOfOrNull { nextFull(it, position + start) - position } ?: tokens.size
            val stop = minOf(start + minOf(manifest.prefillLength, tokens.size - start), room)
            pieces += tokens.copyOfRange(start, stop)
            start = stop
        }
        return pieces
    }

    /** The next number of tokens, above `total`, that fills all slots of a ring. */
    private fun nextFull(ring: LayerCache, total: Int): Int =
        ring.slots + maxOf(0, Math.floorDiv(total - ring.slots, ring.ringStep) + 1) * ring.ringStep

    override fun rewind(to: Int): Int {
        if (to !in 0..position) {
            throw SessionException("can't go back to position $to: $position tokens are in the cache; give 0 to $position")
        }
        if (canGoOn(to, written)) position = to else reset()
        return position
    }

    override fun undoable(most: Int): Int =
        (1..most).takeWhile { canGoOn(position, maxOf(written, position + it)) }.size

    override fun reset() {
        position = 0
        written = 0
    }

    override fun close() = engine.close()

    /** Whether caches in which `written` tokens were can go on from a position. */
    private fun canGoOn(position: Int, written: Int): Boolean = manifest.layers.all { holds(it, position, written) }

    private fun holds(cache: LayerCache, position: Int, written: Int): Boolean {
        val window = cache.window ?: return true
        if (manifest.target.name == "onnx") return firstHeld(cache, position) == firstHeld(cache, written)
        return written - cache.slots <= maxOf(0, position - window + 1)
    }

    /** The position in slot 0: ONNX Runtime moves a full cache to the front, without its first slots - window + 1 tokens. */
    private fun firstHeld(cache: LayerCache, total: Int): Int {
        if (total <= cache.slots) return 0
        return (total - cache.slots + cache.ringStep - 1) / cache.ringStep * cache.ringStep
    }

    private fun run(chunk: IntArray, rows: Int): List<FloatArray> {
        written = maxOf(written, position + chunk.size)
        val logits = engine.run(chunk, position, rows)
        if (logits.size != rows || logits.any { it.size != manifest.vocabSize }) {
            throw SessionException(
                "the artifact returned ${logits.size} rows of ${logits.firstOrNull()?.size ?: 0} logits, expected $rows of " +
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
 * A session that can unload its graph to run another graph of the bundle, so that two are never in
 * memory at once.
 */
class BundleSession(private val manifest: Manifest, private val open: (graph: String) -> Engine) : Session {
    private var loaded: EngineSession? = EngineSession(open(SHIPPED), manifest)

    /** The runtime and its version, for reports. */
    val runtime: String get() = session().runtime

    /** The threads that the runtime computes with, for reports; null if it decides. */
    val threads: Int? get() = session().threads

    override val scoresTogether: Boolean get() = session().scoresTogether

    override val position: Int get() = session().position

    override val contextLength: Int get() = manifest.contextLength

    override fun prefill(tokens: IntArray, beforeChunk: () -> Unit): FloatArray = session().prefill(tokens, beforeChunk)

    override fun decode(token: Int): FloatArray = session().decode(token)

    override fun score(tokens: IntArray): List<FloatArray> = session().score(tokens)

    override fun rewind(to: Int): Int = session().rewind(to)

    override fun undoable(most: Int): Int = session().undoable(most)

    override fun reset() {
        loaded?.reset()
    }

    /** Runs `work` on another graph, then reloads the shipped one with empty caches. */
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
        loaded ?: throw SessionException("the model is no longer in memory; load its bundle again")

    private companion object {
        const val SHIPPED = "decode"
    }
}

/** Throws ContextFullException if `new` tokens don't fit after the `position` tokens in the cache. */
fun checkRoom(position: Int, new: Int, contextLength: Int) {
    if (position + new > contextLength) {
        throw ContextFullException(
            "the cache holds $position tokens, and $new more would exceed the context of $contextLength; " +
                "start a new chat, or export with a larger --context",
        )
    }
}

/** Throws SessionException if the app's runtime is older than the bundle requires. */
fun checkRuntime(library: String, installed: String, minimum: String) {
    val pairs = versionOf(installed).zip(versionOf(minimum))
    val different = pairs.firstOrNull { it.first != it.second } ?: return
    if (different.first < different.second) {
        throw SessionException(
            "$library is $installed, this bundle needs at least $minimum for correct tokens; update the app's library",
        )
    }
}

private fun versionOf(text: String): List<Int> = text.split('.', '+', '-').map { it.toIntOrNull() ?: 0 } + listOf(0, 0, 0)

private fun chunks(tokens: IntArray, length: Int): List<IntArray> =
    tokens.indices.step(length).map { tokens.copyOfRange(it, minOf(it + length, tokens.size)) }
