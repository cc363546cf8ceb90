package gemma.core

import java.util.PriorityQueue

/** Byte pair encoding of text without added pieces: splits it into characters or their bytes and merges by rank. */
internal class Merges(private val vocabulary: Vocabulary) {
    /** Appends the ids of `text`, in which U+2581 replaces spaces. */
    fun encode(text: String, out: MutableList<Int>) {
        val symbols = Symbols(characters(text))
        val queue = PriorityQueue<Candidate>()
        for (left in 0 until symbols.tokens.size - 1) candidate(symbols, left)?.let(queue::add)
        while (true) {
            val best = queue.poll() ?: break
            if (!symbols.merge(best)) continue
            candidate(symbols, symbols.previous[best.left])?.let(queue::add)
            candidate(symbols, best.left)?.let(queue::add)
        }
        symbols.collect(out)
    }

    private fun characters(text: String): IntArray {
        val tokens = ArrayList<Int>(text.length)
        var at = 0
        while (at < text.length) {
            val end = text.offsetByCodePoints(at, 1)
            val character = text.substring(at, end)
            val token = vocabulary.ids[character]
            if (token != null) tokens += token else bytes(character, tokens)
            at = end
        }
        return tokens.toIntArray()
    }

    private fun bytes(character: String, tokens: MutableList<Int>) {
        for (signed in character.toByteArray(Charsets.UTF_8)) {
            val byte = signed.toInt() and 0xFF
            val token = vocabulary.byteTokens[byte]
            if (token < 0) {
                throw TokenizerException("the vocabulary has no token for the byte $byte; export the model again")
            }
            tokens += token
        }
    }

    private fun candidate(symbols: Symbols, left: Int): Candidate? {
        if (left < 0 || symbols.next[left] < 0) return null
        val right = symbols.next[left]
        val first = vocabulary.pieces[symbols.tokens[left]]
        val second = vocabulary.pieces[symbols.tokens[right]]
        val merged = vocabulary.ids[first + second] ?: return null
        val rank = vocabulary.ranks[merged]
        if (rank < 0) return null
        val lengths = first.codePointCount(0, first.length) to second.codePointCount(0, second.length)
        return Candidate(rank, lengths.first, lengths.second, left, symbols.tokens[left], symbols.tokens[right], merged)
    }
}

/** A pair that may be merged; pairs are ordered as in the tokenizer's list of merges. */
private class Candidate(
    private val rank: Int,
    private val leftLength: Int, // characters
    private val rightLength: Int,
    val left: Int, // index in Symbols
    val leftToken: Int,
    val rightToken: Int,
    val merged: Int,
) : Comparable<Candidate> {
    override fun compareTo(other: Candidate): Int = when {
        rank != other.rank -> rank.compareTo(other.rank)
        leftLength != other.leftLength -> other.leftLength.compareTo(leftLength)
        rightLength != other.rightLength -> other.rightLength.compareTo(rightLength)
        else -> left.compareTo(other.left)
    }
}

/** The tokens of a text as a linked list. */
private class Symbols(val tokens: IntArray) {
    val previous = IntArray(tokens.size) { it - 1 }
    val next = IntArray(tokens.size) { if (it + 1 < tokens.size) it + 1 else -1 }

    /** Merges a pair; returns false if one of its tokens was merged into another pair before. */
    fun merge(pair: Candidate): Boolean {
        val right = next[pair.left]
        if (tokens[pair.left] != pair.leftToken || right < 0 || tokens[right] != pair.rightToken) return false
        tokens[pair.left] = pair.merged
        tokens[right] = REMOVED
        next[pair.left] = next[right]
        if (next[right] >= 0) previous[next[right]] = pair.left
        return true
    }

    fun collect(out: MutableList<Int>) {
        var at = if (tokens.isEmpty()) -1 else 0
        while (at >= 0) {
            out += tokens[at]
            at = next[at]
        }
    }

    private companion object {
        const val REMOVED = -1
    }
}
