package gemma.core

/** A part of a template's text: a control token, or the text between two. */
sealed interface TextPart {
    data class Control(val token: Int) : TextPart

    data class Text(val text: String) : TextPart
}

/** Text to token ids and back, with a wall between what a template writes and what a user writes. */
class Tokenizer internal constructor(private val vocabulary: Vocabulary) {
    private val merges = Merges(vocabulary)
    private val added = AddedPieces(vocabulary)
    private val markers = Markers(vocabulary)

    /** Ids of text that anyone may have written, without bos: none is a control token. */
    fun encode(text: String): IntArray {
        if (halfSurrogate(text) >= 0) {
            throw TokenizerException("the text holds half of a surrogate pair; paste or type it again")
        }
        val tokens = encodeRaw(text)
        return (if (tokens.any(vocabulary::isControl)) encodeCut(text) else tokens).toIntArray()
    }

    /** Ids of a template's text: markers such as `<end_of_turn>` become their tokens. */
    fun encodeTemplate(text: String): IntArray = splitControl(text).flatMap { part ->
        when (part) {
            is TextPart.Control -> listOf(part.token)
            is TextPart.Text -> encode(part.text).asList()
        }
    }.toIntArray()

    /** The control tokens that a text names, and the text between them, in order. */
    fun splitControl(text: String): List<TextPart> {
        val parts = ArrayList<TextPart>()
        var start = 0
        for (marker in markers.find(text)) {
            val token = vocabulary.ids[text.substring(marker)]?.takeIf(vocabulary::isControl) ?: continue
            if (marker.first > start) parts += TextPart.Text(text.substring(start, marker.first))
            parts += TextPart.Control(token)
            start = marker.last + 1
        }
        if (start < text.length) parts += TextPart.Text(text.substring(start))
        return parts
    }

    /** Text of `tokens`: control tokens left out, a U+FFFD for each byte that is not UTF-8. */
    fun decode(tokens: IntArray): String {
        val stream = stream()
        return tokens.joinToString("") { stream.push(it) } + stream.flush()
    }

    /** A decoder that takes tokens as they come. */
    fun stream(): StreamDecoder = StreamDecoder(this)

    /** The byte that a token stands for, -1 for other tokens. */
    internal fun byteOf(token: Int): Int = vocabulary.bytes[token] ?: -1

    /** What a token stands for; empty for control and unknown tokens. */
    internal fun textOf(token: Int): String =
        if (token !in 0 until vocabulary.size || vocabulary.isControl(token)) "" else vocabulary.pieces[token].replace(SPACE, ' ')

    private fun encodeRaw(text: String): List<Int> {
        val out = ArrayList<Int>()
        var start = 0
        var at = 0
        while (at < text.length) {
            val token = added.longestAt(text, at)
            val length = if (token < 0) 1 else vocabulary.pieces[token].length
            if (token >= 0 && vocabulary.kinds[token] != PieceKind.SPECIAL) { // whose name is letters
                encodePlain(text, start, at, out)
                out += token
                start = at + length
            }
            at += length
        }
        encodePlain(text, start, text.length, out)
        return out
    }

    private fun encodePlain(text: String, start: Int, end: Int, out: MutableList<Int>) {
        if (start < end) merges.encode(text.substring(start, end).replace(' ', SPACE), out)
    }

    /** Encodes text that names reserved tokens, cut behind the first character of each name. */
    private fun encodeCut(text: String): List<Int> {
        val cuts = listOf(0) + markers.find(text).map { it.first + 1 } + text.length
        val tokens = cuts.zipWithNext().flatMap { (start, end) -> encodeRaw(text.substring(start, end)) }
        tokens.firstOrNull(vocabulary::isControl)?.let {
            throw TokenizerException("the text would become the control token ${vocabulary.pieces[it]}; remove it")
        }
        return tokens
    }

    companion object {
        private const val SPACE = '\u2581'

        /** Raises TokenizerException for a damaged file. */
        fun parse(file: ByteArray): Tokenizer = Tokenizer(Vocabulary.parse(file))

        /** The bundle's tokenizer; raises BundleException if it has none for phones. */
        fun load(bundle: Bundle): Tokenizer = parse(readBytes(bundle.path("tokenizer_compact")))
    }
}
