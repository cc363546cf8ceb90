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

/** Generates tokens: collect its flow once. Cancelling the collector stops it between two runs of the model. */
class TokenGeneration(
    private val session: Session,
    private val request: GenerationRequest,
    private val sampler: Sampler,
) {
    private val generated = ArrayList<Int>()

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
    }

    fun flow(): Flow<Int> = flow {
        val previous = (request.history + request.prompt).toMutableList()
        val context = currentCoroutineContext()
        var logits = session.prefill(request.prompt) { context.ensureActive() }
        while (true) {
            context.ensureActive()
            val token = sampler.pick(logits, previous, request.grammar?.let { it::allows })
            reason = if (token in request.stopTokens) StopReason.STOP_TOKEN else null
            if (reason != null) return@flow
            request.grammar?.accept(token)
            generated += token
            previous += token
            reason = reasonToStop()
            emit(token)
            if (reason != null) return@flow
            logits = session.decode(token)
        }
    }

    private fun reasonToStop(): StopReason? = when {
        request.grammar?.isDone == true -> StopReason.CONSTRAINT
        generated.size == request.maxNewTokens -> StopReason.LENGTH
        session.position == session.contextLength -> StopReason.CONTEXT
        else -> null
    }
}
