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
        ?: throw TokenizerException("this bundle's chat template can't ask for thoughts; turn thinking off in Settings")

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

    /** What the model wrote for itself before the answer, so far; on any thread. */
    val thought: String get() = thoughts.text

    /** Whether a thought is being written, or was when the reply was stopped; on any thread. */
    val isThinking: Boolean get() = thoughts.isOpen

    /** How many tokens of the context the conversation takes up, with this reply so far. */
    val contextTokens: Int get() = promptTokens + generation.tokens.size

    val tokens: List<Int> get() = generation.tokens

    /** Whether it counts in the conversation: one that was stopped before its first token leaves no trace. */
    val hasBegun: Boolean get() = tokens.isNotEmpty() || reason != null

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

/** Turns of user and assistant, of which the model no longer sees the first `forgotten`. */
private data class Course(val turns: List<Message>, val forgotten: Int)

private fun checkPlace(turns: List<Message>, index: Int) {
    if (index == turns.size || turns.getOrNull(index)?.role == Role.USER) return
    throw SessionException("turn $index is not the user's, of ${turns.size} turns; give one of the user's, or ${turns.size}")
}

/**
 * A conversation between a user and the model over one cache. Not thread-safe.
 *
 * Each turn feeds only the tokens that the cache lacks. If the format changes an earlier reply (it may trim
 * it), or the user goes on from an earlier turn, the session goes back to what the two have in common. Where it can't,
 * because a cache no longer holds what it needs, the cache is emptied and the conversation is fed again.
 *
 * With `roll`, a full context makes it forget the oldest turns, a question with its reply at a time, but never
 * the system turn. The next reply is then that of a new conversation that begins with the turns kept.
 *
 * With `thinking`, the model thinks before it answers, also before an answer that a grammar holds; later turns don't see
 * its thoughts. A conversation that was saved goes on from its `earlier` turns, the first `forgotten` of which the model
 * doesn't see. Throws TokenizerException if the template can't ask for thoughts.
 *
 * With `drafts`, repeated passages are guessed, and several tokens checked in one run of the model; `send` throws
 * SessionException if the session can't do that.
 */
class Conversation(
    private val session: Session,
    private val codec: ChatCodec,
    private val sampler: Sampler,
    system: String? = null,
    var roll: Boolean = false,
    private val thinking: Boolean = false,
    earlier: List<Message> = emptyList(),
    forgotten: Int = 0,
    private val drafts: Boolean = false,
) {
    private val format = if (thinking) codec.thinkingFormat() else codec.format
    private val opening = listOfNotNull(system?.let { Message(Role.SYSTEM, it) })
    private var before = Course(emptyList(), 0) // without the last question, which counts once it has a reply
    private var asked = before
    private var fed = IntArray(0)
    private var reply: Reply? = null

    init {
        reset()
        before = Course(earlier, forgotten)
    }

    /** Forgets every turn except the system's. */
    fun reset() {
        before = Course(emptyList(), 0)
        fed = IntArray(0)
        reply = null
        session.reset()
    }

    /** What has been said so far. */
    private val course: Course
        get() {
            val last = reply?.takeIf { it.hasBegun } ?: return before
            return asked.copy(turns = asked.turns + Message(Role.ASSISTANT, last.text))
        }

    /**
     * The turns of user and assistant, also those that the model has forgotten. A stopped reply counts with the text it
     * has; a question without any reply leaves no trace.
     */
    val turns: List<Message> get() = course.turns

    /** How many of the first turns the model no longer sees. */
    val forgotten: Int get() = course.forgotten

    /** What the model sees: the system turn, if there is one, and the turns that it has not forgotten. */
    val messages: List<Message> get() = seen(course)

    /**
     * The reply to `content`. If the conversation no longer fits, throws ContextFullException and changes nothing.
     * With `roll`, only a turn that doesn't fit by itself does so. A grammar holds this reply alone to its format.
     */
    fun send(content: String, maxNewTokens: Int = session.contextLength, grammar: ByteGrammar? = null): Reply =
        sendAt(course.turns.size, content, maxNewTokens, grammar)

    /**
     * As `send`, with `content` in the place of the turn at `index`, which must be the user's; the turns after it are
     * gone once this reply begins. The same content draws another reply. A place among forgotten turns brings back those
     * before it, as far as they fit.
     */
    fun sendAt(index: Int, content: String, maxNewTokens: Int = session.contextLength, grammar: ByteGrammar? = null): Reply {
        val now = course
        checkPlace(now.turns, index)
        val question = Message(Role.USER, content)
        val whole = Course(now.turns.take(index) + question, if (index < now.forgotten) 0 else now.forgotten)
        val (next, tokens) = fitting(whole, maxNewTokens)
        checkFits(tokens)
        val cached = keepBeginning(tokens)
        val request = GenerationRequest(
            prompt = tokens.copyOfRange(cached, tokens.size),
            history = tokens.copyOf(cached),
            maxNewTokens = maxNewTokens,
            stopTokens = codec.stopTokens,
            grammar = grammar?.let { GrammarState(it, codec.tokenizer, codec.stopTokens, thinking) },
        )
        val generation = TokenGeneration(session, request, sampler.forReply(), if (drafts) PromptLookup() else null)
        before = now
        asked = next
        fed = tokens
        return Reply(generation, codec.tokenizer, tokens.size, next.forgotten - whole.forgotten).also { reply = it }
    }

    private fun seen(course: Course): List<Message> = opening + course.turns.drop(course.forgotten)

    /**
     * The turns to feed and their tokens; with `roll`, without the oldest if there is no room. A quarter of the
     * context is kept free for the reply, or all of the reply if that is less.
     */
    private fun fitting(whole: Course, maxNewTokens: Int): Pair<Course, IntArray> {
        val room = session.contextLength - minOf(maxNewTokens, session.contextLength / 4)
        var next = whole
        while (true) {
            val tokens = encodeChat(codec.tokenizer, format, seen(next))
            if (!roll || tokens.size <= room || next.forgotten == next.turns.size - 1) return next to tokens
            next = next.copy(forgotten = next.forgotten + 2)
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
