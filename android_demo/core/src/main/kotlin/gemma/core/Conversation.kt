package gemma.core

import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow

/** What of a bundle a conversation needs. */
data class Voice(
    val tokenizer: Tokenizer,
    val format: ChatFormat,
    val bosToken: Int,
    val stopTokens: Set<Int>,
) {
    companion object {
        fun load(bundle: Bundle) = Voice(
            Tokenizer.load(bundle),
            ChatFormat.load(bundle),
            bundle.manifest.bosToken,
            bundle.manifest.stopTokens,
        )
    }
}

/** The model's answer under way: collect `pieces` once, for whole characters as they come. */
class Reply internal constructor(internal val generation: TokenGeneration, private val tokenizer: Tokenizer) {
    private val said = StringBuilder()

    /** What was said so far. */
    val text: String get() = said.toString()

    val tokens: List<Int> get() = generation.tokens

    /** Why it ended; null while it has not, and when it was stopped. */
    val reason: StopReason? get() = generation.reason

    val pieces: Flow<String> = flow {
        val decoder = tokenizer.stream()
        generation.flow().collect { token ->
            val piece = decoder.push(token)
            said.append(piece)
            emit(piece) // also an empty one: a token was made
        }
        val rest = decoder.flush()
        said.append(rest)
        if (rest.isNotEmpty()) emit(rest)
    }
}

/**
 * Turns between a user and the model, sharing one cache. Not for several threads at once.
 *
 * Each turn feeds only what the cache lacks. When the format writes an earlier turn otherwise than the
 * model did (it trims the reply, say), the cache is emptied and fed anew.
 */
class Conversation(
    private val session: Session,
    private val voice: Voice,
    private val sampler: Sampler,
    private val system: String? = null,
) {
    private val turns = ArrayList<Message>()
    private var fed = IntArray(0)
    private var reply: Reply? = null

    init {
        reset()
    }

    /** Forgets every turn but the system's. */
    fun reset() {
        turns.clear()
        system?.let { turns += Message(Role.SYSTEM, it) }
        fed = IntArray(0)
        reply = null
        session.reset()
    }

    /** The turns so far. A reply that was stopped counts as far as it came; one that never began, not at all. */
    val messages: List<Message>
        get() {
            val last = reply ?: return turns.toList()
            if (last.tokens.isEmpty() && last.reason == null) return turns.dropLast(1)
            return turns + Message(Role.ASSISTANT, last.text)
        }

    /** The reply to `content`. Raises ContextFullException, and stays as it was, if the conversation no longer fits. */
    fun send(content: String, maxNewTokens: Int = session.contextLength): Reply {
        val messages = messages + Message(Role.USER, content)
        val tokens = encodeChat(voice.tokenizer, voice.format, messages, voice.bosToken)
        checkFits(tokens)
        val cached = usableCache(tokens)
        val request = GenerationRequest(
            prompt = tokens.copyOfRange(cached, tokens.size),
            history = tokens.copyOf(cached),
            maxNewTokens = maxNewTokens,
            stopTokens = voice.stopTokens,
        )
        val next = Reply(TokenGeneration(session, request, sampler), voice.tokenizer)
        turns.clear()
        turns += messages
        fed = tokens
        reply = next
        return next
    }

    /** Tokens of the cache that begin the conversation; the session is emptied where it holds others. */
    private fun usableCache(tokens: IntArray): Int {
        val held = fed + (reply?.tokens.orEmpty())
        val count = session.position
        val same = count < tokens.size && count <= held.size && (0 until count).all { held[it] == tokens[it] }
        if (same) return count
        session.reset()
        return 0
    }

    private fun checkFits(tokens: IntArray) {
        if (tokens.size > session.contextLength) {
            throw ContextFullException(
                "the conversation has ${tokens.size} tokens, the context holds ${session.contextLength}; " +
                    "start a new chat, say less, or export with a larger --context",
            )
        }
    }
}
