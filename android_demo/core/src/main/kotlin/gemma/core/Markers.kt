package gemma.core

/** Pieces that are matched as a whole in raw text before merging; the leftmost match wins, then the longest. */
internal class AddedPieces(vocabulary: Vocabulary) {
    private class Node {
        val next = HashMap<Char, Node>(2)
        var token = -1
    }

    private val root = Node()

    init {
        for (token in 0 until vocabulary.size) {
            val kind = vocabulary.kinds[token]
            val matched = kind == PieceKind.ADDED || kind == PieceKind.SPECIAL || kind == PieceKind.RESERVED
            if (matched && vocabulary.pieces[token].isNotEmpty()) add(vocabulary.pieces[token], token)
        }
    }

    /** The longest piece that starts at `start`; -1 if none does. */
    fun longestAt(text: String, start: Int): Int {
        var node = root
        var best = -1
        for (at in start until text.length) {
            node = node.next[text[at]] ?: break
            if (node.token >= 0) best = node.token
        }
        return best
    }

    private fun add(piece: String, token: Int) {
        var node = root
        for (character in piece) node = node.next.getOrPut(character) { Node() }
        node.token = token
    }
}

/** The names of control tokens, which only a template may use. Reserved names count even if the vocabulary lacks them. */
internal class Markers(vocabulary: Vocabulary) {
    private val names: List<String> = (0 until vocabulary.size)
        .filter { vocabulary.isControl(it) && !isReserved(vocabulary.pieces[it]) }
        .map { vocabulary.pieces[it] }
        .filter { it.isNotEmpty() }
        .sortedByDescending { it.length }
    private val firstCharacters: Set<Char> = names.map { it[0] }.toSet() + setOf('<', '[')

    /** The range of each marker, in order. */
    fun find(text: String): List<IntRange> {
        val ranges = ArrayList<IntRange>()
        var at = 0
        while (at < text.length) {
            val length = if (text[at] in firstCharacters) lengthAt(text, at) else 0
            if (length > 0) ranges += at until at + length
            at += maxOf(1, length)
        }
        return ranges
    }

    private fun lengthAt(text: String, at: Int): Int =
        names.firstOrNull { text.startsWith(it, at) }?.length ?: reservedLength(text, at)
}

private const val UNUSED = "<unused"
private val RESERVED = listOf("<mask>", "[multimodal]")

private fun isReserved(piece: String): Boolean = piece.isNotEmpty() && reservedLength(piece, 0) == piece.length

/** Length of a name such as `<unused7>`, `<mask>` or `[multimodal]` at an index; 0 if there is none. */
private fun reservedLength(text: String, at: Int): Int {
    RESERVED.firstOrNull { text.startsWith(it, at) }?.let { return it.length }
    if (!text.startsWith(UNUSED, at)) return 0
    var end = at + UNUSED.length
    while (end < text.length && text[end] in '0'..'9') end++
    val complete = end > at + UNUSED.length && end < text.length && text[end] == '>'
    return if (complete) end + 1 - at else 0
}
