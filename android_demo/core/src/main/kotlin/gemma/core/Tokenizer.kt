package gemma.core

/** A part of a template: a control token, or the text between two. */
sealed interface TextPart {
    data class Control(val token: Int) : TextPart

    data class Text(val text: String) : TextPart
}

/** Turns text into token ids and back. Only a template can write control tokens; a user's text never becomes one. */
class Tokenizer internal constructor(private val vocabulary: Vocabulary) {
    private val merges = Merges(vocabulary)
    private val added = AddedPieces(vocabulary)
    private val markers = Markers(vocabulary)

    /** Token ids of untrusted text, without bos and without control tokens. */
    fun encode(text: String): IntArray {
        if (unpairedSurrogate(text) >= 0) {
            throw TokenizerException("the text has an unpaired surrogate; paste or type it again")
        }
        val tokens = encodeRaw(text)
        return (if (tokens.any(vocabulary::isControl)) encodeCut(text) else tokens).toIntArray()
    }

    /** Token ids of a template's text; markers such as `<end_of_turn>` become control tokens. */
    fun encodeTemplate(text: String): IntArray = splitControl(text).flatMap { part ->
        when (part) {
            is TextPart.Control -> listOf(part.token)
            is TextPart.Text -> encode(part.text).asList()
        }
    }.toIntArray()

    /** Splits text into the control tokens that it names and the text between them. */
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

    /** The text of `tokens` without control tokens; each byte that is not valid UTF-8 becomes U+FFFD. */
    fun decode(tokens: IntArray): String {
        val stream = stream()
        return tokens.joinToString("") { stream.push(it) } + stream.flush()
    }

    /** The text of `tokens` with the names of control tokens. */
    internal fun decodeWhole(tokens: List<Int>): String {
        val stream = stream()
        return tokens.joinToString("") { if (isControl(it)) stream.flush() + vocabulary.pieces[it] else stream.push(it) } + stream.flush()
    }

    /** A decoder for tokens that arrive one by one. */
    fun stream(): StreamDecoder = StreamDecoder(this)

    /** The token with this name or text; null if there is none. */
    internal fun tokenOf(piece: String): Int? = vocabulary.ids[piece]

    /** The byte that a byte token stands for; -1 for other tokens. */
    internal fun byteOf(token: Int): Int = vocabulary.bytes[token] ?: -1

    /** The text of a token; empty for control tokens and unknown ids. */
    internal fun textOf(token: Int): String =
        if (token !in 0 until vocabulary.size || isControl(token)) "" else vocabulary.pieces[token].replace(SPACE, ' ')

    private fun isControl(token: Int) = token in 0 until vocabulary.size && vocabulary.isControl(token)

    private fun encodeRaw(text: String): List<Int> {
        val out = ArrayList<Int>()
        var start = 0
        var at = 0
        while (at < text.length) {
            val token = added.longestAt(text, at)
            val length = if (token < 0) 1 else vocabulary.pieces[token].length
            if (token >= 0 && vocabulary.kinds[token] != PieceKind.SPECIAL) { // a special token's name is encoded as plain letters
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

    /** Encodes text that names control tokens: splits it after the first character of each name, so none is matched. */
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

        /** Throws TokenizerException if the file is damaged. */
        fun parse(file: ByteArray): Tokenizer = Tokenizer(Vocabulary.parse(file))

        /** The bundle's tokenizer; throws BundleException if the bundle has no compact tokenizer. */
        fun load(bundle: Bundle): Tokenizer = parse(readBytes(bundle.path("tokenizer_compact")))
    }
}
