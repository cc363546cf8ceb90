package gemma.core

private const val MAX_ADDRESS = 2000 // characters; what is longer is no link, so that a text is read in linear time
private const val MAX_NESTED = 32 // parentheses in an address

/** What follows a link's text. `address` is null if the text ends before it does; `next` is where the text goes on. */
internal class Destination(val address: String?, val next: Int)

/** The destination of a link, such as `(https://a.b "title")`; null if there is none at `start`. */
internal fun destinationAt(text: String, start: Int): Destination? {
    if (text.getOrNull(start) != '(') return null
    val limit = minOf(text.length, start + MAX_ADDRESS)
    val incomplete = if (limit == text.length) Destination(null, text.length) else null
    var at = skipSpace(text, start + 1, limit)
    val isAngled = at < limit && text[at] == '<'
    val address = StringBuilder()
    var nested = 0
    if (isAngled) at++
    while (at < limit) {
        val letter = text[at]
        val isEscape = letter == '\\' && at + 1 < limit && text[at + 1].code < 128 && isPunctuation(text[at + 1].code)
        if (isEscape) at++
        if (!isEscape && isAngled && letter == '>') break
        if (isAngled && (letter == '\n' || (!isEscape && letter == '<'))) return null
        if (!isAngled && letter.code <= 32) break
        if (!isEscape && !isAngled && letter == '(' && ++nested > MAX_NESTED) return null
        if (!isEscape && !isAngled && letter == ')' && --nested < 0) break
        address.append(text[at++])
    }
    if (at == limit) return incomplete
    if (!isAngled && nested > 0) return null
    if (isAngled) at++
    val end = skipTitle(text, at, limit)
    if (end >= limit) return incomplete
    return if (text[end] == ')') Destination(address.toString(), end + 1) else null
}

/** The place after white space, a title and white space; `limit` if the title doesn't end. */
private fun skipTitle(text: String, start: Int, limit: Int): Int {
    val at = skipSpace(text, start, limit)
    if (at == start || at == limit || text[at] !in "\"'(") return at
    val close = if (text[at] == '(') ')' else text[at]
    var end = at + 1
    while (end < limit && text[end] != close) end += if (text[end] == '\\') 2 else 1
    return skipSpace(text, minOf(end + 1, limit), limit)
}

private fun skipSpace(text: String, start: Int, limit: Int): Int {
    var at = start
    while (at < limit && text[at] in " \t\n") at++
    return at
}

/** The address at `start`: up to `close`, or if that is null, up to where a bare address ends; null if there is none. */
internal fun addressAt(text: String, start: Int, close: Char?): String? {
    val scheme = SCHEMES.firstOrNull { text.startsWith(it, start) && (close != null || it != "mailto:") } ?: return null
    val limit = minOf(text.length, start + MAX_ADDRESS)
    var end = start
    while (end < limit && text[end].code > 32 && text[end] !in (if (close == null) "<>\"`[]|" else "<>")) end++
    if (close != null) return text.substring(start, end).takeIf { end < limit && text[end] == close && end > start + scheme.length }
    var opened = (start until end).count { text[it] == '(' } - (start until end).count { text[it] == ')' }
    while (end > start && (text[end - 1] in ".,;:!?'*_~" || (text[end - 1] == ')' && opened < 0))) {
        if (text[--end] == ')') opened++
    }
    return text.substring(start, end).takeIf { it.length > scheme.length }
}

/** An address that may be opened at a tap; others, which could name a file or run a script, are not links. */
internal fun safeLink(address: String): String? = address.takeIf { SCHEMES.any { scheme -> it.startsWith(scheme, ignoreCase = true) } }

private val SCHEMES = listOf("https://", "http://", "mailto:")

internal fun isSpacing(point: Int): Boolean = point in 9..13 || Character.getType(point) == Character.SPACE_SEPARATOR.toInt()

/** Whether a code point is punctuation or a symbol. */
internal fun isPunctuation(point: Int): Boolean = when (Character.getType(point).toByte()) {
    Character.CONNECTOR_PUNCTUATION, Character.DASH_PUNCTUATION, Character.START_PUNCTUATION, Character.END_PUNCTUATION,
    Character.INITIAL_QUOTE_PUNCTUATION, Character.FINAL_QUOTE_PUNCTUATION, Character.OTHER_PUNCTUATION,
    Character.MATH_SYMBOL, Character.CURRENCY_SYMBOL, Character.MODIFIER_SYMBOL, Character.OTHER_SYMBOL,
    -> true
    else -> false
}
