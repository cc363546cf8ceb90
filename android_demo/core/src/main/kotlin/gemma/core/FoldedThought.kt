package gemma.core

/** A thought as a screen shows it above its answer: one line, which unfolds the text. */
data class FoldedThought(
    val text: String = "",
    val isWriting: Boolean = false, // whether more of it may come
    val isUnfolded: Boolean = false,
) {
    /** Whether there is anything to show: a model also writes empty thoughts. */
    val isShown: Boolean get() = isWriting || text.isNotEmpty()

    /** The line, with a sign for what a tap does. */
    val line: String get() = "${if (isUnfolded) "▾" else "▸"} $name"

    /** The line for screen readers, which don't know the sign. */
    val description: String get() = "$name, ${if (isUnfolded) "unfolded" else "folded"}"

    /** What is below the line; null if nothing is. */
    val body: String? get() = text.takeIf { isUnfolded && it.isNotEmpty() }

    private val name: String get() = if (isWriting) "Thinking…" else "Thought"

    fun toggled(): FoldedThought = copy(isUnfolded = !isUnfolded)

    /** With what a reply has thought until now. Once the thought is whole nothing is copied: this is called for each token. */
    fun following(reply: Reply): FoldedThought {
        val isWriting = reply.isThinking
        if (!isWriting && !this.isWriting && text.isNotEmpty()) return this
        return copy(text = reply.thought, isWriting = isWriting)
    }

    /** With what a reply has thought in all; one that was stopped may never have ended its thought. */
    fun ended(reply: Reply): FoldedThought = copy(text = reply.thought, isWriting = false)
}
