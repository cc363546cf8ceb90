package gemma.core

import java.math.BigDecimal
import java.math.MathContext
import java.math.RoundingMode

/** The value as Python's `json.dumps(value, ensure_ascii=False)` writes it, or with `indent=2`, over several lines. */
internal fun Json.pythonJson(indented: Boolean = false): String = StringBuilder().also { PythonWriter(it, indented).value(this, 0) }.toString()

private class PythonWriter(private val out: StringBuilder, private val indented: Boolean) {
    fun value(value: Json, depth: Int) {
        when (value) {
            is JsonObject -> items('{', '}', value.fields.entries, depth) { (name, item) ->
                string(name)
                out.append(": ")
                value(item, depth + 1)
            }
            is JsonArray -> items('[', ']', value.items, depth) { value(it, depth + 1) }
            is JsonString -> string(value.text)
            is JsonNumber -> out.append(pythonNumber(value))
            is JsonBoolean -> out.append(value.value)
            JsonNull -> out.append("null")
        }
    }

    private fun <T> items(opens: Char, closes: Char, items: Collection<T>, depth: Int, write: (T) -> Unit) {
        out.append(opens)
        items.forEachIndexed { index, item ->
            if (index > 0) out.append(if (indented) "," else ", ")
            if (indented) line(depth + 1)
            write(item)
        }
        if (indented && items.isNotEmpty()) line(depth)
        out.append(closes)
    }

    private fun line(depth: Int) {
        out.append('\n')
        repeat(depth) { out.append("  ") }
    }

    private fun string(text: String) {
        out.append('"')
        for (character in text) {
            val plain = "\"\\\n\r\t\b\u000c".indexOf(character)
            when {
                plain >= 0 -> out.append('\\').append("\"\\nrtbf"[plain])
                character < ' ' -> out.append("\\u" + character.code.toString(16).padStart(4, '0'))
                else -> out.append(character)
            }
        }
        out.append('"')
    }
}

/** A number as Python writes it: a whole one with all its digits, another one with the fewest that give it again. */
internal fun pythonNumber(number: JsonNumber): String {
    number.whole?.let { return it }
    val value = number.value
    if (value == 0.0) return if (1 / value < 0) "-0.0" else "0.0"
    val exact = BigDecimal(Math.abs(value))
    // Below a power of two numbers are closer together than above it, so the nearest digits may be another number's.
    val shortest = (1..17).asSequence().flatMap { digits -> ROUNDINGS.map { exact.round(MathContext(digits, it)) }.asSequence() }
        .first { it.toDouble() == Math.abs(value) }
    return (if (value < 0) "-" else "") + written(shortest)
}

private val ROUNDINGS = listOf(RoundingMode.HALF_EVEN, RoundingMode.UP)

/** Digits with a point, or with an exponent below 1e-4 and from 1e16 on. */
private fun written(number: BigDecimal): String {
    val digits = number.unscaledValue().toString().trimEnd('0')
    val exponent = number.precision() - number.scale() - 1 // of the first digit
    val fraction = if (digits.length > 1) "." + digits.substring(1) else ""
    if (exponent !in -4..15) {
        val sign = if (exponent < 0) "-" else "+"
        return digits.take(1) + fraction + "e" + sign + Math.abs(exponent).toString().padStart(2, '0')
    }
    if (exponent < 0) return "0." + "0".repeat(-exponent - 1) + digits
    return digits.padEnd(exponent + 1, '0').take(exponent + 1) + "." + digits.drop(exponent + 1).ifEmpty { "0" }
}
