package gemma.core

import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow

/** The parts of a bundle that turn messages into tokens and tokens into text. */
data class ChatCodec(
    val tokenizer: Tokenizer,
    val format: ChatFormat,
    val stopTokens: Set<Int>,
) {
    /** Whether the template can ask for thoughts. */
    val canThink: Boolean get() = format.thinking != null

    internal fun thinkingFormat(): ChatFormat = format.thinking
        ?: throw TokenizerException("this model's chat template can't ask for thoughts; turn thinking off")

    companion object {
        fun load(bundle: Bundle) = ChatCodec(
            Tokenizer.load(bundle),
            ChatFormat.load(bundle),
            bundle.manifest.stopTokens,
        )
    }
}

/** The model's reply as it is generated: collect `pieces` once; each holds whole characters only. */
class Reply internal constructor(
    internal val generation: TokenGeneration,
    private val tokenizer: Tokenizer,
    private val promptTokens: Int, // all of the prompt's, cached or fed
    /** How many turns were forgotten to make room for this reply. */
    val forgotten: Int,
) {
    private val received = StringBuilder()
    private val thoughts = Thoughts(tokenizer)

    /** The text so far, without thoughts. */
    val text: String get() = received.toString()

    /** What the model wrote for itself before the answer. */
    val thought: String get() = thoughts.text

    /** Whether a thought is being written. */
    val isThinking: Boolean get() = thoughts.isOpen

    /** How many tokens of the context the conversation takes up, with this reply so far. */
    val contextTokens: Int get() = promptTokens + generation.tokens.size

    val tokens: List<Int> get() = generation.tokens

    /** Why the reply ended; null while it is running and after it was stopped. */
    val reason: StopReason? get() = generation.reason

    val pieces: Flow<String> = flow {
        val decoder = tokenizer.stream()
        generation.flow().collect { token ->
            val piece = thoughts.take(token, decoder.push(token))
            received.append(piece)
            emit(piece) // also an empty one, since a token was generated
        }
        val rest = thoughts.end(decoder.flush())
        received.append(rest)
        if (rest.isNotEmpty()) emit(rest)
    }
}

/**
 * A conversation between a user and the model over one cache. Not thread-safe.
 *
 * Each turn feeds only the tokens that the cache lacks. If the format changes an earlier reply (it may trim
 * it), the cached tokens no longer match; then the cache is emptied and the conversation is fed again.
 *
 * With `roll`, a full context makes it forget the oldest turns, a question with its reply at a time, but never
 * the system turn. The next reply is then that of a new conversation that begins with the turns kept.
 *
 * With `thinking`, the model thinks before it answers; later turns don't see its thoughts. A conversation that was
 * saved goes on from its `earlier` turns. Throws TokenizerException if the template can't ask for thoughts.
 */
class Conversation(
    private val session: Session,
    private val codec: ChatCodec,
    private val sampler: Sampler,
    private val system: String? = null,
    var roll: Boolean = false,
    thinking: Boolean = false,
    earlier: List<Message> = emptyList(),
) {
    private val format = if (thinking) codec.thinkingFormat() else codec.format
    private val turns = ArrayList<Message>()
    private var fed = IntArray(0)
    private var reply: Reply? = null

    /** How many turns, replies included, it has forgotten since it was created. */
    var forgotten = 0
        private set

    init {
        reset()
        turns += earlier
    }

    /** Forgets every turn except the system's. */
    fun reset() {
        turns.clear()
        system?.let { turns += Message(Role.SYSTEM, it) }
        fed = IntArray(0)
        reply = null
        forgotten = 0
        session.reset()
    }

    /** The turns so far. A stopped reply counts with the text it has; a question without any reply is left out. */
    val messages: List<Message>
        get() {
            val last = reply ?: return turns.toList()
            if (last.tokens.isEmpty() && last.reason == null) return turns.dropLast(1)
            return turns + Message(Role.ASSISTANT, last.text)
        }

    /**
     * The reply to `content`. If the conversation no longer fits, throws ContextFullException and changes nothing.
     * With `roll`, only a turn that doesn't fit by itself does so. A grammar holds this reply alone to its format.
     */
    fun send(content: String, maxNewTokens: Int = session.contextLength, grammar: ByteGrammar? = null): Reply {
        val asked = messages + Message(Role.USER, content)
        val (messages, tokens) = fitting(asked, maxNewTokens)
        checkFits(tokens)
        val cached = keepBeginning(tokens)
        val request = GenerationRequest(
            prompt = tokens.copyOfRange(cached, tokens.size),
            history = tokens.copyOf(cached),
            maxNewTokens = maxNewTokens,
            stopTokens = codec.stopTokens,
            grammar = grammar?.let { GrammarState(it, codec.tokenizer, codec.stopTokens) },
        )
        val dropped = asked.size - messages.size
        val next = Reply(TokenGeneration(session, request, sampler), codec.tokenizer, tokens.size, dropped)
        forgotten += dropped
        turns.clear()
        turns += messages
        fed = tokens
        reply = next
        return next
    }

    /**
     * The turns to feed and their tokens; with `roll`, without the oldest if there is no room. A quarter of the
     * context is kept free for the reply, or all of the reply if that is less.
     */
    private fun fitting(asked: List<Message>, maxNewTokens: Int): Pair<List<Message>, IntArray> {
        val room = session.contextLength - minOf(maxNewTokens, session.contextLength / 4)
        val kept = asked.takeWhile { it.role == Role.SYSTEM }
        var turns = asked.drop(kept.size)
        while (true) {
            val tokens = encodeChat(codec.tokenizer, format, kept + turns)
            if (!roll || tokens.size <= room || turns.size == 1) return kept + turns to tokens
            turns = turns.drop(2)
        }
    }

    /** Goes back to what the cache and `tokens` have in common at the beginning; returns how many tokens that are. */
    private fun keepBeginning(tokens: IntArray): Int {
        val cached = fed + (reply?.tokens.orEmpty())
        if (session.position > cached.size) return session.rewind(0) // not all of it is this conversation's
        val count = minOf(session.position, tokens.size - 1)
        return session.rewind((0 until count).firstOrNull { cached[it] != tokens[it] } ?: count)
    }

    private fun checkFits(tokens: IntArray) {
        if (tokens.size > session.contextLength) {
            throw ContextFullException(
                "the conversation has ${tokens.size} tokens, the context holds ${session.contextLength}; " +
                    "start a new chat, shorten the message, or export with a larger --context",
            )
        }
    }
}
