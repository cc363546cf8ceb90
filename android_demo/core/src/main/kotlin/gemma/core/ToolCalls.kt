package gemma.core

/** A reply without its calls, and the calls. */
internal data class FoundCalls(val text: String, val calls: List<ToolCall>)

/**
 * Finds calls between a template's marks, or else as JSON with names of tools, alone or in a list, as the whole text or in a
 * fenced block. A call that can't be read is left in the text, and all of them where there are no tools.
 */
internal fun findCalls(text: String, names: Set<String>, marks: ToolMarks?): FoundCalls {
    if (names.isEmpty()) return FoundCalls(text, emptyList())
    if (marks != null && marks.opensIn(text)) return findMarked(text, marks)
    for (body in bodies(text)) {
        val calls = readCalls(body.content)
        if (calls.isNotEmpty() && calls.all { it.name in names }) {
            return FoundCalls(strip(text.substring(0, body.start) + text.substring(body.end)), calls)
        }
    }
    return FoundCalls(text, emptyList())
}

private const val FENCE = "```"
private val LANGUAGES = listOf("json", "tool_code", "tool_call", "python")

/** Where calls can stand. */
private class Body(val start: Int, val end: Int, val content: String)

/** The fenced blocks, then the whole text. */
private fun bodies(text: String): List<Body> {
    val bodies = ArrayList<Body>()
    var at = text.indexOf(FENCE)
    while (at >= 0) {
        val body = fenced(text, at)
        if (body != null) bodies += body
        at = text.indexOf(FENCE, body?.end ?: (at + 1))
    }
    return bodies + Body(0, text.length, strip(text))
}

/** The block that begins with a fence at `start`; null if there is none. */
private fun fenced(text: String, start: Int): Body? {
    val language = start + FENCE.length
    var at = language + (LANGUAGES.firstOrNull { text.startsWith(it, language) }?.length ?: 0)
    while (at < text.length && text[at] != '\n' && strip(text[at].toString()).isEmpty()) at++
    if (at == text.length || text[at] != '\n') return null
    val end = text.indexOf(FENCE, at + 1)
    return if (end < 0) null else Body(start, end + FENCE.length, strip(text.substring(at + 1, end)))
}

private fun readCalls(text: String): List<ToolCall> {
    val found = try {
        parseJson(text)
    } catch (_: JsonException) {
        return emptyList()
    }
    val calls = (if (found is JsonArray) found.items else listOf(found)).map(::readCall)
    return if (null in calls) emptyList() else calls.filterNotNull()
}

private fun readCall(entry: Json): ToolCall? {
    val fields = (entry as? JsonObject)?.fields ?: return null
    val name = fields["name"] as? JsonString ?: return null
    val arguments = fields["parameters"] ?: fields["arguments"] ?: JsonObject(emptyMap())
    return (arguments as? JsonObject)?.let { ToolCall(name.text, it) }
}

private fun findMarked(text: String, marks: ToolMarks): FoundCalls {
    val (opens, closes) = marks.call
    val calls = ArrayList<ToolCall>()
    val rest = StringBuilder()
    var at = 0
    while (true) {
        val start = text.indexOf(opens, at)
        val name = start + opens.length
        if (start < 0 || name == text.length || text[name] == '{') { // no more calls, or one without a name
            val next = if (start < 0) text.length else name
            rest.append(text, at, next)
            at = next
            if (start < 0 || name == text.length) break else continue
        }
        val body = text.indexOf('{', name).let { if (it < 0) text.length else it }
        val end = text.indexOf(closes, body).let { if (it < 0) text.length else it }
        val call = MarkedCall(text.substring(body, end).trimEnd { it in WHITE_SPACE }, marks.quote).read()
        val after = minOf(text.length, end + closes.length)
        rest.append(text, at, if (call == null) after else start)
        if (call != null) calls += ToolCall(strip(text.substring(name, body)), call)
        at = after
    }
    return FoundCalls(if (calls.isEmpty()) text else strip(rest.toString()), calls)
}

/** Reads a call's arguments between braces. */
private class MarkedCall(private val text: String, private val quote: String) {
    private class Unreadable : Exception()

    private var at = 0

    /** The arguments; null if they can't be read, or more follows. */
    fun read(): JsonObject? = try {
        (value(0) as? JsonObject)?.takeIf { at == text.length }
    } catch (_: Unreadable) {
        null
    }

    private fun value(depth: Int): Json {
        if (depth > MAX_DEPTH) throw Unreadable()
        if (text.startsWith(quote, at)) return JsonString(quoted())
        if (peek() == '{') return JsonObject(LinkedHashMap<String, Json>().also { fields -> items('}') { fields[key()] = value(depth + 1) } })
        if (peek() == '[') return JsonArray(ArrayList<Json>().also { values -> items(']') { values += value(depth + 1) } })
        val start = at
        while (peek() !in ",}]") at++
        return bare(strip(text.substring(start, at)))
    }

    private fun items(closes: Char, read: () -> Unit) {
        at++
        while (peek() != closes) {
            read()
            if (peek() == ',') at++ else if (peek() != closes) throw Unreadable()
        }
        at++
    }

    private fun key(): String {
        val key = if (text.startsWith(quote, at)) quoted() else strip(upTo(":"))
        if (peek() != ':') throw Unreadable()
        at++
        return key
    }

    private fun quoted(): String {
        at += quote.length
        return upTo(quote).also { at += quote.length }
    }

    private fun upTo(mark: String): String {
        val end = text.indexOf(mark, at)
        if (end < 0) throw Unreadable()
        return text.substring(at, end).also { at = end }
    }

    private fun peek(): Char = if (at < text.length) text[at] else throw Unreadable()
}

private val NUMBER = Regex("(-?)0*([0-9]+(?:\\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)")

/** A value without quotes. */
private fun bare(text: String): Json {
    val number = NUMBER.matchEntire(text)?.let { (it.groupValues[1] + it.groupValues[2]) }?.let(JsonNumber::read)
    if (number != null && !number.value.isInfinite()) return number
    return when (text.lowercase()) {
        "true" -> JsonBoolean(true)
        "false" -> JsonBoolean(false)
        "null", "none" -> JsonNull
        else -> JsonString(text)
    }
}
