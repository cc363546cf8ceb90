package gemma.core

/** Tokens in, whole characters out. The pushes and the flush, joined, are what `Tokenizer.decode` gives. */
class StreamDecoder internal constructor(private val tokenizer: Tokenizer) {
    private val pending = ArrayList<Int>() // the bytes of a character that is not complete

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

    /** What is left at the end: a U+FFFD for each byte of an unfinished character. */
    fun flush(): String {
        val left = UNKNOWN.repeat(pending.size)
        pending.clear()
        return left
    }

    private fun complete(): String {
        val out = StringBuilder()
        while (pending.isNotEmpty()) {
            val need = sequenceLength(pending[0])
            val valid = (1 until minOf(need, pending.size)).takeWhile { continues(pending[0], it, pending[it]) }.size + 1
            when {
                need == 0 -> out.append(take(1, false))
                valid == need -> out.append(take(need, true))
                valid == pending.size -> return out.toString() // more may come
                else -> out.append(take(valid, false))
            }
        }
        return out.toString()
    }

    private fun take(count: Int, whole: Boolean): String {
        val bytes = ByteArray(count) { pending[it].toByte() }
        pending.subList(0, count).clear()
        return if (whole) String(bytes, Charsets.UTF_8) else UNKNOWN.repeat(count)
    }

    private companion object {
        const val UNKNOWN = "\uFFFD"

        /** Bytes of the character that a byte begins, 0 where none begins so. */
        fun sequenceLength(first: Int): Int = when (first) {
            in 0x00..0x7F -> 1
            in 0xC2..0xDF -> 2
            in 0xE0..0xEF -> 3
            in 0xF0..0xF4 -> 4
            else -> 0
        }

        /** Whether a byte may stand at a place behind the first (Unicode 15, table 3-7). */
        fun continues(first: Int, place: Int, byte: Int): Boolean = when {
            place > 1 -> byte in 0x80..0xBF
            first == 0xE0 -> byte in 0xA0..0xBF
            first == 0xED -> byte in 0x80..0x9F
            first == 0xF0 -> byte in 0x90..0xBF
            first == 0xF4 -> byte in 0x80..0x8F
            else -> byte in 0x80..0xBF
        }
    }
}
