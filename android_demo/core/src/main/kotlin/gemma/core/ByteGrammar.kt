package gemma.core

/**
 * Follows a text byte by byte through a grammar that `gemma-runtime compile-schema` wrote.
 *
 * `byte_grammar.py` of the runtime describes the format; this is the same code. A state is a number. What may follow
 * a byte is again a grammar, the derivative; equal grammars get the same number, so each is made once. Throws
 * SchemaException, also while it follows, for a grammar that would take too much memory or too deep a stack.
 */
class ByteGrammar private constructor(json: Json) {
    private val nodes = arrayListOf<Node>(NO_CASE, Node.Bytes(emptyList())) // the second is never looked at
    private val endings = arrayListOf(false, true)
    private val depths = arrayListOf(1, 1) // of the calls that a derivative takes
    private var work = 0
    private val numbers = HashMap<Node, Int>()
    private val derivatives = HashMap<Long, Int>()

    /** The state before the first byte. */
    val start: Int

    init {
        val fields = (json as? JsonObject)?.fields ?: throw wrong("it is no object")
        val written = (fields["nodes"] as? JsonArray)?.items ?: throw wrong("it has no nodes")
        val read = ArrayList<Int>()
        written.forEach { read += GrammarNode(it, read).read() }
        start = read.getOrNull(whole(fields["start"]) ?: -1) ?: throw wrong("it has no start")
    }

    /** The state behind a byte; NOTHING if the byte may not come next. */
    fun after(state: Int, byte: Int): Int {
        val key = state.toLong() shl 8 or byte.toLong()
        return derivatives[key] ?: derive(state, byte).also {
            if (derivatives.size >= MOST_DERIVATIVES) derivatives.clear()
            derivatives[key] = it
        }
    }

    /** The state behind some bytes; NOTHING if they may not come next. */
    fun follow(state: Int, text: ByteArray): Int {
        var now = state
        for (byte in text) {
            if (now == NOTHING) break
            now = after(now, byte.toInt() and 0xFF)
        }
        return now
    }

    /** Whether the text may end here. */
    fun mayEnd(state: Int): Boolean = endings[state]

    private fun derive(state: Int, byte: Int): Int {
        if (state <= END) return NOTHING
        return when (val node = nodes[state]) {
            is Node.Bytes -> if (node.ranges.any { byte in it }) END else NOTHING
            is Node.Seq -> {
                val behind = sequence(after(node.first, byte), node.rest)
                if (mayEnd(node.first)) choice(listOf(behind, after(node.rest, byte))) else behind
            }
            is Node.Alt -> choice(node.cases.map { after(it, byte) })
            is Node.Repeat -> {
                val left = repeat(node.body, maxOf(node.least - 1, 0), node.most?.let { it - 1 })
                sequence(after(node.body, byte), left)
            }
        }
    }

    /** Nested to the right, so that equal sequences get the same number. */
    private fun sequence(first: Int, rest: Int): Int {
        val firsts = ArrayList<Int>()
        var last = first
        var node = nodes[last]
        while (node is Node.Seq) {
            firsts += node.first
            last = node.rest
            node = nodes[last]
        }
        spend(firsts.size)
        return firsts.foldRight(pair(last, rest), ::pair)
    }

    private fun pair(first: Int, rest: Int): Int = when {
        first == NOTHING || rest == NOTHING -> NOTHING
        first == END || rest == END -> maxOf(first, rest)
        else -> number(Node.Seq(first, rest), mayEnd(first) && mayEnd(rest))
    }

    private fun choice(cases: List<Int>): Int {
        val flat = HashSet<Int>()
        for (case in cases) {
            val parts = (nodes[case] as? Node.Alt)?.cases ?: listOf(case)
            spend(parts.size)
            flat += parts
        }
        return flat.singleOrNull() ?: number(Node.Alt(flat.sorted()), flat.any(::mayEnd))
    }

    private fun repeat(body: Int, least: Int, most: Int?): Int = when {
        most == 0 || body == END -> END
        body == NOTHING -> if (least == 0) END else NOTHING
        else -> number(Node.Repeat(body, least, most), least == 0 || mayEnd(body))
    }

    private fun number(node: Node, mayEnd: Boolean): Int {
        if (node == NO_CASE) return NOTHING
        return numbers.getOrPut(node) {
            spend(1 + parts(node).size)
            val depth = 1 + (callsOf(node).maxOfOrNull { depths[it] } ?: 0)
            if (depth > DEEPEST) throw tooLarge()
            nodes += node
            endings += mayEnd
            depths += depth
            nodes.size - 1
        }
    }

    private fun spend(steps: Int) {
        work += steps
        if (work > MOST_WORK) throw tooLarge()
    }

    private fun parts(node: Node): List<Int> = when (node) {
        is Node.Bytes -> emptyList()
        is Node.Seq -> listOf(node.first, node.rest)
        is Node.Alt -> node.cases
        is Node.Repeat -> listOf(node.body)
    }

    /** The parts whose derivatives that of a node is made of. */
    private fun callsOf(node: Node): List<Int> = if (node is Node.Seq && !mayEnd(node.first)) listOf(node.first) else parts(node)

    /** A node as it is written, and the numbers of those before it. */
    private inner class GrammarNode(private val json: Json, private val earlier: List<Int>) {
        private val parts = (json as? JsonArray)?.items ?: throw refusal()

        fun read(): Int = when ((parts.firstOrNull() as? JsonString)?.text) {
            "bytes" -> number(Node.Bytes(ranges(parts.getOrNull(1))), false)
            "text" -> text((parts.getOrNull(1) as? JsonString)?.text ?: throw refusal())
            "seq" -> parts.drop(1).map(::earlierNode).foldRight(END, ::sequence)
            "alt" -> choice(parts.drop(1).map(::earlierNode))
            "repeat" -> repetition()
            else -> throw refusal()
        }

        private fun ranges(json: Json?): List<IntRange> {
            val ranges = (json as? JsonArray)?.items.orEmpty().map { range ->
                val ends = (range as? JsonArray)?.items.orEmpty().map { whole(it) ?: throw refusal() }
                if (ends.size != 2 || ends[0] > ends[1] || ends[1] > 255) throw refusal()
                ends[0]..ends[1]
            }
            return ranges.ifEmpty { throw refusal() }
        }

        private fun text(text: String): Int =
            text.toByteArray().map { it.toInt() and 0xFF }.foldRight(END) { byte, rest ->
                pair(number(Node.Bytes(listOf(byte..byte)), false), rest)
            }

        private fun repetition(): Int {
            val least = whole(parts.getOrNull(2)) ?: throw refusal()
            val most = parts.getOrNull(3).takeIf { it != JsonNull }?.let { whole(it) ?: throw refusal() }
            if (parts.size != 4 || (most != null && most < least)) throw refusal()
            return repeat(earlierNode(parts[1]), least, most)
        }

        private fun earlierNode(json: Json): Int = earlier.getOrNull(whole(json) ?: -1) ?: throw refusal()

        private fun refusal() = wrong("its node ${earlier.size} is ${json.write().take(40)}")
    }

    private sealed interface Node {
        data class Bytes(val ranges: List<IntRange>) : Node

        data class Seq(val first: Int, val rest: Int) : Node

        data class Alt(val cases: List<Int>) : Node

        data class Repeat(val body: Int, val least: Int, val most: Int?) : Node
    }

    companion object {
        const val NOTHING = 0 // no text at all
        const val END = 1 // the empty text
        private val NO_CASE = Node.Alt(emptyList())
        private const val MOST_WORK = 1_000_000 // parts of nodes, and steps to make them: some 50 MB
        private const val MOST_DERIVATIVES = 300_000 // the memory of so many is freed, and they are made again
        private const val DEEPEST = 256 // fits in the stack of a thread

        /** Throws JsonException if the text is not JSON, SchemaException if it is not a grammar. */
        fun parse(text: String): ByteGrammar = of(parseJson(text))

        fun of(json: Json): ByteGrammar = ByteGrammar(json)

        private fun wrong(what: String) =
            SchemaException("the grammar is not valid: $what; run gemma-runtime compile-schema again")

        private fun tooLarge() = SchemaException("the grammar is too large to follow; compile a smaller schema")

        /** A whole number of at least 0 that fits in 32 bits. */
        private fun whole(json: Json?): Int? =
            (json as? JsonNumber)?.value?.takeIf { it == Math.rint(it) && it in 0.0..Int.MAX_VALUE.toDouble() }?.toInt()
    }
}

/** Where a reply stands in its grammar. With `thinking` it may begin with a thought, which the grammar doesn't hold. */
class GrammarState(
    private val grammar: ByteGrammar,
    private val tokenizer: Tokenizer,
    private val stopTokens: Set<Int>,
    thinking: Boolean = false,
) {
    private val opens = tokenizer.tokenOf(THOUGHT_OPENS)
    private val closes = tokenizer.tokenOf(THOUGHT_CLOSES)
    private var mayThink = thinking && opens != null && closes != null
    private var isThinking = false
    private var state = grammar.start

    /** Whether the reply is complete and nothing may follow. */
    val isDone: Boolean get() = !isThinking && state == ByteGrammar.END

    /**
     * Whether a token may come next: text that the grammar allows, or a stop token where the reply may end. A thought may
     * have any but stop tokens.
     */
    fun allows(token: Int): Boolean = when {
        isThinking -> token !in stopTokens
        mayThink && token == opens -> true
        token in stopTokens -> grammar.mayEnd(state)
        else -> after(token) != ByteGrammar.NOTHING
    }

    fun accept(token: Int) {
        when {
            isThinking -> isThinking = token != closes
            mayThink && token == opens -> isThinking = true
            else -> state = after(token)
        }
        mayThink = false
    }

    private fun after(token: Int): Int {
        val byte = tokenizer.byteOf(token)
        if (byte >= 0) return grammar.after(state, byte)
        val text = tokenizer.textOf(token)
        return if (text.isEmpty()) ByteGrammar.NOTHING else grammar.follow(state, text.toByteArray())
    }
}
