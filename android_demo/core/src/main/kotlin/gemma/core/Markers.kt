package gemma.core

/** Pieces that are found whole in raw text, leftmost first, then longest. */
internal class AddedPieces(vocabulary: Vocabulary) {
    private class Node {
        val next = HashMap<Char, Node>(2)
        var token = -1
    }

    private val root = Node()

    init {
        for (token in 0 until vocabulary.size) {
            val kind = vocabulary.kinds[token]
            val found = kind == PieceKind.ADDED || kind == PieceKind.SPECIAL || kind == PieceKind.RESERVED
            if (found && vocabulary.pieces[token].isNotEmpty()) add(vocabulary.pieces[token], token)
        }
    }

    /** The longest piece that begins here, -1 where none does. */
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

/** What a template may write and a user may not: the names of control tokens, whether or not there are such. */
internal class Markers(vocabulary: Vocabulary) {
    private val named: List<String> = (0 until vocabulary.size)
        .filter { vocabulary.kinds[it] == PieceKind.SPECIAL && !isReserved(vocabulary.pieces[it]) }
        .map { vocabulary.pieces[it] }
        .filter { it.isNotEmpty() }
        .sortedByDescending { it.length }
    private val begins: Set<Char> = named.map { it[0] }.toSet() + setOf('<', '[')

    /** From start to end (exclusive) of each marker, in order. */
    fun find(text: String): List<IntRange> {
        val found = ArrayList<IntRange>()
        var at = 0
        while (at < text.length) {
            val length = if (text[at] in begins) lengthAt(text, at) else 0
            if (length > 0) found += at until at + length
            at += maxOf(1, length)
        }
        return found
    }

    private fun lengthAt(text: String, at: Int): Int =
        named.firstOrNull { text.startsWith(it, at) }?.length ?: reservedLength(text, at)
}

private const val UNUSED = "<unused"
private val RESERVED = listOf("<mask>", "[multimodal]")

private fun isReserved(piece: String): Boolean = piece.isNotEmpty() && reservedLength(piece, 0) == piece.length

/** Length of `<unused7>`, `<mask>` or `[multimodal]` at a place, 0 where there is none. */
private fun reservedLength(text: String, at: Int): Int {
    RESERVED.firstOrNull { text.startsWith(it, at) }?.let { return it.length }
    if (!text.startsWith(UNUSED, at)) return 0
    var end = at + UNUSED.length
    while (end < text.length && text[end] in '0'..'9') end++
    val whole = end > at + UNUSED.length && end < text.length && text[end] == '>'
    return if (whole) end + 1 - at else 0
}
