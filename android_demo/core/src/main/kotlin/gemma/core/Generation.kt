package gemma.core

import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.flow

enum class StopReason { STOP_TOKEN, LENGTH, CONTEXT }

/** What to make of a prompt. */
data class GenerationRequest(
    val prompt: IntArray, // tokens to feed
    val history: IntArray, // tokens the caches hold already; only a repetition penalty reads them
    val maxNewTokens: Int,
    val stopTokens: Set<Int>,
)

/** Tokens under way: collect them once. Cancelling the collector ends it between two tokens. */
class TokenGeneration(
    private val session: Session,
    private val request: GenerationRequest,
    private val sampler: Sampler,
) {
    private val made = ArrayList<Int>()

    /** The new tokens so far, the stop token left out. */
    val tokens: List<Int> get() = made

    /** Why it ended; null while it has not, and when it was cancelled. */
    var reason: StopReason? = null
        private set

    init {
        checkRoom(session.position, request.prompt.size, session.contextLength)
        if (request.maxNewTokens < 1) {
            throw SessionException("max_new_tokens is ${request.maxNewTokens}, expected at least 1")
        }
    }

    fun flow(): Flow<Int> = flow {
        val previous = (request.history + request.prompt).toMutableList()
        var logits = session.prefill(request.prompt)
        while (true) {
            currentCoroutineContext().ensureActive()
            val token = sampler.pick(logits, previous)
            reason = if (token in request.stopTokens) StopReason.STOP_TOKEN else null
            if (reason != null) return@flow
            made += token
            previous += token
            reason = endAfter()
            emit(token)
            if (reason != null) return@flow
            logits = session.decode(token)
        }
    }

    private fun endAfter(): StopReason? = when {
        made.size == request.maxNewTokens -> StopReason.LENGTH
        session.position == session.contextLength -> StopReason.CONTEXT
        else -> null
    }
}
