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

    /** Whether the model can be given tools. */
    val canCall: Boolean get() = format.tools != null

    /** Throws TokenizerException if the model can't be given tools, SchemaException if its template can't write these. */
    fun check(tools: Tools) = checkTools(tokenizer, format, tools)

    /** What ends a reply: also the token with which a model waits for the results of its calls. */
    internal val ends: Set<Int> get() = stopTokens + listOfNotNull(format.tools?.marks?.let { tokenizer.tokenOf(it.waits) })

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
    private val codec: ChatCodec,
    private val prompt: IntArray, // all of it, cached or fed
    private val tools: Set<String>, // their names
    /** How many turns were forgotten to make room for this reply. */
    val forgotten: Int,
    /** The turns with the results that it answers; none for the reply to a question. */
    val results: List<Message>,
) {
    private val tokenizer = codec.tokenizer
    private val received = StringBuilder()
    private val answer = ArrayList<Int>() // tokens that are not of a thought
    private val thoughts = Thoughts(tokenizer, prompt)
    private var found: FoundCalls? = null // once it has ended

    /** The text so far, without thoughts; once it has ended, without calls too. */
    val text: String get() = found?.text ?: received.toString()

    /** The calls of tools that it asks for, once it has ended. */
    val toolCalls: List<ToolCall> get() = found?.calls.orEmpty()

    /** What the model wrote for itself before the answer, so far; on any thread. */
    val thought: String get() = thoughts.text

    /** Whether a thought is being written, or was when the reply was stopped; on any thread. */
    val isThinking: Boolean get() = thoughts.isOpen

    /** How many tokens of the context the conversation takes up, with this reply so far. */
    val contextTokens: Int get() = prompt.size + generation.tokens.size

    val tokens: List<Int> get() = generation.tokens

    /** Whether it counts in the conversation: one that was stopped before its first token leaves no trace. */
    val hasBegun: Boolean get() = tokens.isNotEmpty() || reason != null

    /** Why the reply ended; null while it is running and after it was stopped. */
    val reason: StopReason? get() = generation.reason

    val pieces: Flow<String> = flow {
        val decoder = tokenizer.stream()
        generation.flow().collect { token ->
            val piece = thoughts.take(token, decoder.push(token))
            if (!thoughts.tookLast) answer += token
            received.append(piece)
            emit(piece) // also an empty one, since a token was generated
        }
        val rest = thoughts.end(decoder.flush())
        received.append(rest)
        readCalls()
        if (rest.isNotEmpty()) emit(rest)
    }

    /** Reads the calls. Their tokens may be left out of the text, so a template's are looked for in all that was written. */
    private fun readCalls() {
        val marks = codec.format.tools?.marks
        val whole = if (marks == null) received.toString() else tokenizer.decodeWhole(answer)
        found = findCalls(if (marks != null && marks.opensIn(whole)) whole else received.toString(), tools, marks).takeIf { it.calls.isNotEmpty() }
    }
}

/** Turns of user, assistant and tools, of which the model no longer sees the first `forgotten`. */
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
 * With `tools`, a reply has the calls that it asks for; `sendResults` gives the model what they returned. A thought before calls
 * is kept until the user's next turn. Throws TokenizerException if this model can't be given tools, and SchemaException if its
 * template can't write these.
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
    val tools: Tools = Tools.NONE,
) {
    private val format = if (thinking) codec.thinkingFormat() else codec.format
    private val opening = listOfNotNull(system?.let { Message(Role.SYSTEM, it) })
    private var before = Course(emptyList(), 0) // without the last question, which counts once it has a reply
    private var asked = before
    private var fed = IntArray(0)
    private var reply: Reply? = null

    init {
        checkTools(codec.tokenizer, format, tools)
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
            val calls = last.toolCalls
            val said = Message(Role.ASSISTANT, last.text, calls, thought = if (calls.isEmpty()) "" else last.thought)
            return asked.copy(turns = asked.turns + said)
        }

    /**
     * The turns of user, assistant and tools, also those that the model has forgotten. A stopped reply counts with the text it
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
        val whole = Course(now.turns.take(index) + Message(Role.USER, content), if (index < now.forgotten) 0 else now.forgotten)
        return replyTo(whole, maxNewTokens, grammar)
    }

    /** The reply to the results of the calls in the last turn, in their order. Throws SessionException if it has other calls. */
    fun sendResults(results: List<Json>, maxNewTokens: Int = session.contextLength): Reply {
        val now = course
        val calls = now.turns.lastOrNull()?.toolCalls.orEmpty()
        if (calls.isEmpty() || calls.size != results.size) {
            throw SessionException("the last reply calls ${calls.size} tools, but there are ${results.size} results; give one for each call")
        }
        return replyTo(now.copy(turns = now.turns + calls.zip(results, ::resultTurn)), maxNewTokens, null)
    }

    private fun replyTo(whole: Course, maxNewTokens: Int, grammar: ByteGrammar?): Reply {
        val now = course
        val (next, tokens) = fitting(whole, maxNewTokens)
        checkFits(tokens)
        val cached = keepBeginning(tokens)
        val request = GenerationRequest(
            prompt = tokens.copyOfRange(cached, tokens.size),
            history = tokens.copyOf(cached),
            maxNewTokens = maxNewTokens,
            stopTokens = codec.ends,
            grammar = grammar?.let { GrammarState(it, codec.tokenizer, codec.ends, thinking) },
        )
        val generation = TokenGeneration(session, request, sampler.forReply(), if (drafts) PromptLookup() else null)
        before = now
        asked = next
        fed = tokens
        val results = next.turns.takeLastWhile { it.role == Role.TOOL }
        return Reply(generation, codec, tokens, tools.names, next.forgotten - whole.forgotten, results).also { reply = it }
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
            val tokens = encodeChat(codec.tokenizer, format, seen(next), tools)
            val question = (next.forgotten + 1 until next.turns.size).firstOrNull { next.turns[it].role == Role.USER }
            if (!roll || tokens.size <= room || question == null) return next to tokens
            next = next.copy(forgotten = question)
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
