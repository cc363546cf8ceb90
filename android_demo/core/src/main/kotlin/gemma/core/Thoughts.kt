package gemma.core

internal const val THOUGHT_OPENS = "<|channel>"
internal const val THOUGHT_CLOSES = "<channel|>"

/**
 * Tells a reply's thoughts from its answer; Gemma 4 writes them into a channel before it:
 *
 *     <|channel>thought
 *     …<channel|>the answer
 *
 * A prompt may have begun the channel already, as after the results of tools. Another thread than the one that takes tokens
 * may look at the thoughts.
 */
internal class Thoughts(tokenizer: Tokenizer, prompt: IntArray = IntArray(0)) {
    private val open = tokenizer.tokenOf(THOUGHT_OPENS)
    private val close = tokenizer.tokenOf(THOUGHT_CLOSES)
    private val written = StringBuilder()

    /** Whether a thought is being written. */
    @Volatile
    var isOpen = false
        private set

    init {
        val at = prompt.indexOfLast { it == open || it == close }
        if (at >= 0 && prompt[at] == open) {
            isOpen = true
            written.append(tokenizer.decode(prompt.copyOfRange(at + 1, prompt.size)))
        }
    }

    /** The thoughts, without the channel's name, which is the first line. */
    val text: String @Synchronized get() = strip(written.substring(written.indexOf("\n") + 1).takeIf { '\n' in written }.orEmpty())

    /** Whether the token that was taken last belongs to a thought. */
    var tookLast = false
        private set

    /** What of the text that a token completes is the answer's. */
    @Synchronized
    fun take(token: Int, piece: String): String {
        tookLast = isOpen || token == open
        if (token == open) {
            isOpen = true
            return ""
        }
        if (!isOpen) return piece
        isOpen = token != close
        written.append(if (isOpen) piece else piece.removeSuffix(THOUGHT_CLOSES))
        return ""
    }

    /** What of the text's end, which no token completed, is the answer's. */
    @Synchronized
    fun end(rest: String): String {
        if (!isOpen) return rest
        written.append(rest)
        return ""
    }
}
