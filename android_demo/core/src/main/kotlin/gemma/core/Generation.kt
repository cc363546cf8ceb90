package gemma.core

import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow

/** CONSTRAINT: the grammar allows nothing more. */
enum class StopReason { STOP_TOKEN, LENGTH, CONTEXT, CONSTRAINT }

/** A prompt and when to stop generating. */
data class GenerationRequest(
    val prompt: IntArray, // tokens to feed
    val history: IntArray, // tokens that are cached already; only the repetition penalty uses them
    val maxNewTokens: Int,
    val stopTokens: Set<Int>,
    val grammar: GrammarState? = null, // what the reply must be
)

/**
 * Generates tokens: collect its flow once. Cancelling the collector stops it between two runs of the model.
 *
 * The tokens that a `drafter` guesses are checked together; under a grammar there are no drafts. Throws SessionException
 * if the session takes one run for each token anyway.
 */
class TokenGeneration(
    private val session: Session,
    private val request: GenerationRequest,
    private val sampler: Sampler,
    drafter: Drafter? = null,
) {
    private val drafter = drafter.takeIf { request.grammar == null }
    private val generated = ArrayList<Int>()
    private val previous = (request.history + request.prompt).toMutableList()

    /** The new tokens so far, without the stop token. */
    val tokens: List<Int> get() = generated

    /** Why it ended; null while it is running and after it was cancelled. */
    var reason: StopReason? = null
        private set

    init {
        checkRoom(session.position, request.prompt.size, session.contextLength)
        if (request.maxNewTokens < 1) {
            throw SessionException("max_new_tokens is ${request.maxNewTokens}, expected at least 1")
        }
        if (drafter != null && !session.scoresTogether) {
            throw SessionException("this bundle's graph gives the logits of one token per run, so drafts save no time; turn them off")
        }
    }

    fun flow(): Flow<Int> = flow {
        val context = currentCoroutineContext()
        var chosen = listOf(pick(session.prefill(request.prompt) { context.ensureActive() }))
        while (true) {
            context.ensureActive()
            val right = chosen.dropLast(1)
            generated += right // before any is emitted: they are in the cache
            right.forEach { emit(it) }
            val token = chosen.last()
            reason = if (token in request.stopTokens) StopReason.STOP_TOKEN else null
            if (reason != null) return@flow
            request.grammar?.accept(token)
            generated += token
            previous += token
            reason = reasonToStop()
            emit(token)
            if (reason != null) return@flow
            chosen = step(token)
        }
    }

    /** Feeds a token, and guesses of what follows it. Returns the right guesses, which stay fed, and one token more. */
    private fun step(token: Int): List<Int> {
        val drafter = drafter ?: return listOf(pick(session.decode(token)))
        val drafted = drafter.draft(previous, undoable())
        val chosen = if (drafted.isEmpty()) listOf(pick(session.decode(token))) else check(token, drafted)
        drafter.judge(drafted.size, chosen.size - 1)
        return chosen
    }

    /** Chooses tokens up to the first wrong guess, and takes back the wrong ones. */
    private fun check(token: Int, drafted: List<Int>): List<Int> {
        val chosen = ArrayList<Int>()
        for ((logits, guess) in session.score((listOf(token) + drafted).toIntArray()).zip(drafted + null)) {
            chosen += pick(logits)
            if (chosen.last() != guess || guess in request.stopTokens) break
            previous += guess
        }
        session.rewind(session.position - (drafted.size - (chosen.size - 1)))
        return chosen
    }

    /** How many guesses fit, and can be taken back, after one more token. */
    private fun undoable(): Int {
        val left = request.maxNewTokens - generated.size - 1
        val most = minOf(left, session.contextLength - session.position - 1)
        return if (most > 0) maxOf(0, session.undoable(1 + most) - 1) else 0
    }

    private fun pick(logits: FloatArray): Int = sampler.pick(logits, previous, request.grammar?.let { it::allows })

    private fun reasonToStop(): StopReason? = when {
        request.grammar?.isDone == true -> StopReason.CONSTRAINT
        generated.size == request.maxNewTokens -> StopReason.LENGTH
        session.position == session.contextLength -> StopReason.CONTEXT
        else -> null
    }
}
