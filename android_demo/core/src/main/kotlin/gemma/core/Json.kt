package gemma.core

/** A JSON value. */
sealed interface Json

data class JsonObject(val fields: Map<String, Json>) : Json

data class JsonArray(val items: List<Json>) : Json

data class JsonString(val text: String) : Json

class JsonNumber private constructor(
    val value: Double,
    private val isWhole: Boolean,
    private val digits: String?, // of a number that a double may not hold
) : Json {
    constructor(value: Double) : this(value, isWhole = false, digits = null)

    /** All digits of a number that was written without a fraction and an exponent; null for others. */
    internal val whole: String? get() = digits ?: if (isWhole) value.toLong().toString() else null

    internal companion object {
        private const val LARGEST_EXACT = 9007199254740992.0 // 2^53

        /** A number as it was written, without leading zeros. */
        fun read(text: String): JsonNumber {
            val value = text.toDouble()
            val isWhole = text.none { it in ".eE" }
            return JsonNumber(value, isWhole, text.takeIf { isWhole && Math.abs(value) >= LARGEST_EXACT })
        }
    }

    /** Numbers are the same if their values are, however they were written. */
    override fun equals(other: Any?): Boolean = other is JsonNumber && value.compareTo(other.value) == 0

    override fun hashCode(): Int = value.hashCode()

    override fun toString(): String = "JsonNumber($value)"
}

data class JsonBoolean(val value: Boolean) : Json

data object JsonNull : Json

/** The value as JSON on one line; whole numbers have no fraction, NaN and infinities become null. */
fun Json.write(): String = StringBuilder().also { writeTo(it) }.toString()

private fun Json.writeTo(out: StringBuilder) {
    when (this) {
        is JsonObject -> writeFields(out)
        is JsonArray -> {
            items.forEachIndexed { index, item ->
                out.append(if (index == 0) "[" else ", ")
                item.writeTo(out)
            }
            out.append(if (items.isEmpty()) "[]" else "]")
        }
        is JsonString -> writeString(text, out)
        is JsonNumber -> out.append(writeNumber(value))
        is JsonBoolean -> out.append(value)
        JsonNull -> out.append("null")
    }
}

private fun JsonObject.writeFields(out: StringBuilder) {
    out.append('{')
    fields.entries.forEachIndexed { index, (name, value) ->
        if (index > 0) out.append(", ")
        writeString(name, out)
        out.append(": ")
        value.writeTo(out)
    }
    out.append('}')
}

private fun writeNumber(value: Double): String = when {
    value.isNaN() || value.isInfinite() -> "null"
    value == Math.rint(value) && Math.abs(value) < 1e15 -> value.toLong().toString()
    else -> value.toString()
}

private fun writeString(text: String, out: StringBuilder) {
    out.append('"')
    for (character in text) {
        when {
            character == '"' || character == '\\' -> out.append('\\').append(character)
            character == '\n' -> out.append("\\n")
            character < ' ' || character.isSurrogate() -> out.append(String.format("\\u%04x", character.code))
            else -> out.append(character)
        }
    }
    out.append('"')
}
