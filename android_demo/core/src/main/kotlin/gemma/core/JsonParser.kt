package gemma.core

/** Parses strict RFC 8259 JSON; refuses duplicate names, numbers too large for a double and unpaired surrogates. */
fun parseJson(text: String): Json {
    val parser = JsonParser(text, 0)
    val value = parser.value(0)
    parser.skipSpace()
    if (parser.at < text.length) parser.fail("more text after the value")
    return value
}

internal const val MAX_DEPTH = 128

/** Parses one value from `at`, which then points after it. */
internal class JsonParser(private val text: String, var at: Int) {
    fun value(depth: Int): Json {
        if (depth > MAX_DEPTH) fail("nesting deeper than $MAX_DEPTH levels")
        skipSpace()
        return when (peek()) {
            '{' -> objectOf(depth)
            '[' -> arrayOf(depth)
            '"' -> JsonString(string())
            't' -> word("true", JsonBoolean(true))
            'f' -> word("false", JsonBoolean(false))
            'n' -> word("null", JsonNull)
            else -> number()
        }
    }

    fun skipSpace() {
        while (at < text.length && text[at] in " \t\n\r") at++
    }

    fun fail(what: String): Nothing = throw JsonException("not JSON: $what at character ${at + 1}")

    private fun peek(): Char = if (at < text.length) text[at] else fail("unexpected end of text")

    private fun expect(character: Char) {
        if (peek() != character) fail("found '${peek()}', expected '$character'")
        at++
    }

    /** Consumes the next character if it is this one; returns whether it was. */
    private fun consume(character: Char): Boolean {
        skipSpace()
        if (peek() != character) return false
        at++
        return true
    }

    private fun objectOf(depth: Int): JsonObject {
        expect('{')
        val fields = LinkedHashMap<String, Json>()
        if (consume('}')) return JsonObject(fields)
        do {
            skipSpace()
            val name = string()
            skipSpace()
            expect(':')
            if (fields.put(name, value(depth + 1)) != null) fail("duplicate name \"$name\"")
        } while (consume(','))
        expect('}')
        return JsonObject(fields)
    }

    private fun arrayOf(depth: Int): JsonArray {
        expect('[')
        val items = ArrayList<Json>()
        if (consume(']')) return JsonArray(items)
        do items += value(depth + 1) while (consume(','))
        expect(']')
        return JsonArray(items)
    }

    private fun word(word: String, value: Json): Json {
        if (!text.startsWith(word, at)) fail("an unknown word")
        at += word.length
        return value
    }

    private fun number(): JsonNumber {
        val match = NUMBER.matcher(text).region(at, text.length)
        if (!match.lookingAt()) fail("found '${peek()}', expected a value")
        val number = JsonNumber.read(match.group())
        if (number.value.isInfinite()) fail("a number too large for a double")
        at = match.end()
        return number
    }

    private fun string(): String {
        expect('"')
        val out = StringBuilder()
        while (true) {
            val character = peek()
            if (character < ' ') fail("a control character in a string")
            at++
            when (character) {
                '"' -> return checked(out)
                '\\' -> out.append(escape())
                else -> out.append(character)
            }
        }
    }

    private fun escape(): Char {
        val character = peek()
        at++
        val plain = "\"\\/bfnrt".indexOf(character)
        if (plain >= 0) return "\"\\/\b\u000c\n\r\t"[plain]
        if (character != 'u') fail("an unknown escape \\$character")
        val digits = text.substring(at, minOf(at + 4, text.length))
        if (digits.length < 4 || digits.any { it !in "0123456789abcdefABCDEF" }) fail("\\u without four hexadecimal digits")
        at += 4
        return digits.toInt(16).toChar()
    }

    private fun checked(out: StringBuilder): String {
        if (unpairedSurrogate(out) >= 0) fail("an unpaired surrogate")
        return out.toString()
    }

    private companion object {
        val NUMBER: java.util.regex.Pattern =
            java.util.regex.Pattern.compile("-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][+-]?[0-9]+)?")
    }
}

/** Index of the first unpaired surrogate; -1 if there is none. */
internal fun unpairedSurrogate(text: CharSequence): Int {
    var at = 0
    while (at < text.length) {
        val pair = at + 1 < text.length && Character.isSurrogatePair(text[at], text[at + 1])
        if (text[at].isSurrogate() && !pair) return at
        at += if (pair) 2 else 1
    }
    return -1
}
