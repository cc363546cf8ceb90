package gemma.core

internal const val THOUGHT_OPENS = "<|channel>"
internal const val THOUGHT_CLOSES = "<channel|>"

/**
 * Tells a reply's thoughts from its answer; Gemma 4 writes them into a channel before it:
 *
 *     <|channel>thought
 *     …<channel|>the answer
 *
 * Another thread than the one that takes tokens may look at the thoughts.
 */
internal class Thoughts(tokenizer: Tokenizer) {
    private val open = tokenizer.tokenOf(THOUGHT_OPENS)
    private val close = tokenizer.tokenOf(THOUGHT_CLOSES)
    private val written = StringBuilder()

    /** Whether a thought is being written. */
    @Volatile
    var isOpen = false
        private set

    /** The thoughts, without the channel's name, which is the first line. */
    val text: String @Synchronized get() = strip(written.substring(written.indexOf("\n") + 1).takeIf { '\n' in written }.orEmpty())

    /** What of the text that a token completes is the answer's. */
    @Synchronized
    fun take(token: Int, piece: String): String {
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
