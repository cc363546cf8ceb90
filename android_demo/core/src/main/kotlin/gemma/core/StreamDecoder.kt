package gemma.core

/** Decodes tokens one by one into whole characters. All pushes and the flush together equal `Tokenizer.decode`. */
class StreamDecoder internal constructor(private val tokenizer: Tokenizer) {
    private val pending = ArrayList<Int>() // bytes of an incomplete character

    /** The text that `token` completes. */
    fun push(token: Int): String {
        val byte = tokenizer.byteOf(token)
        if (byte >= 0) {
            pending += byte
            return complete()
        }
        val text = tokenizer.textOf(token)
        return if (text.isEmpty()) "" else flush() + text
    }

    /** Ends the text: one U+FFFD for each byte of an incomplete character. */
    fun flush(): String {
        val rest = REPLACEMENT.repeat(pending.size)
        pending.clear()
        return rest
    }

    private fun complete(): String {
        val out = StringBuilder()
        while (pending.isNotEmpty()) {
            val length = sequenceLength(pending[0])
            val valid = (1 until minOf(length, pending.size)).takeWhile { continues(pending[0], it, pending[it]) }.size + 1
            when {
                length == 0 -> out.append(take(1, false))
                valid == length -> out.append(take(length, true))
                valid == pending.size -> return out.toString() // the next token may complete it
                else -> out.append(take(valid, false))
            }
        }
        return out.toString()
    }

    private fun take(count: Int, decode: Boolean): String {
        val bytes = ByteArray(count) { pending[it].toByte() }
        pending.subList(0, count).clear()
        return if (decode) String(bytes, Charsets.UTF_8) else REPLACEMENT.repeat(count)
    }

    private companion object {
        const val REPLACEMENT = "\uFFFD"

        /** Length in bytes of a character that starts with this byte; 0 if no character does. */
        fun sequenceLength(first: Int): Int = when (first) {
            in 0x00..0x7F -> 1
            in 0xC2..0xDF -> 2
            in 0xE0..0xEF -> 3
            in 0xF0..0xF4 -> 4
            else -> 0
        }

        /** Whether a byte may follow the first one at an index (Unicode 15, table 3-7). */
        fun continues(first: Int, index: Int, byte: Int): Boolean = when {
            index > 1 -> byte in 0x80..0xBF
            first == 0xE0 -> byte in 0xA0..0xBF
            first == 0xED -> byte in 0x80..0x9F
            first == 0xF0 -> byte in 0x90..0xBF
            first == 0xF4 -> byte in 0x80..0x8F
            else -> byte in 0x80..0xBF
        }
    }
}
