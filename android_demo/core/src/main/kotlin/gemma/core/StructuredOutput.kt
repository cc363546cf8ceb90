package gemma.core

/** What a model's text is worth as an answer to a schema. */
sealed interface StructuredResult {
    data class Valid(val value: Json) : StructuredResult

    data class Invalid(val violations: List<Violation>) : StructuredResult
}

/** The request, with what is expected of the answer. */
fun structuredPrompt(request: String, schema: Schema): String =
    "$request\n\nAnswer with JSON alone, no other words, that matches this JSON Schema:\n$schema"

/** What to say to the model after an answer that was not right. */
fun retryPrompt(violations: List<Violation>): String =
    "That answer does not match the schema:\n" +
        violations.take(MOST_VIOLATIONS).joinToString("\n") { "- ${it.path}: ${it.message}" } +
        "\nAnswer again with the corrected JSON alone."

/** Finds the JSON in a model's text, parses it, and validates it. */
fun checkStructured(text: String, schema: Schema): StructuredResult {
    val value = extractJson(text)
        ?: return StructuredResult.Invalid(listOf(Violation("$", "the answer holds no whole JSON value")))
    val violations = schema.validate(value)
    return if (violations.isEmpty()) StructuredResult.Valid(value) else StructuredResult.Invalid(violations)
}

/** The whole text as JSON, or the first object or list in it; null where there is none. */
fun extractJson(text: String): Json? {
    attempt { parseJson(text) }?.let { return it }
    return text.indices.asSequence()
        .filter { text[it] == '{' || text[it] == '[' }
        .take(MOST_BEGINNINGS)
        .mapNotNull { start -> attempt { JsonParser(text, start).value(0) } }
        .firstOrNull()
}

/** Asks until the answer is right, at most `attempts` times; the last result either way. */
suspend fun askStructured(
    conversation: Conversation,
    request: String,
    schema: Schema,
    attempts: Int = 3,
    onPiece: suspend (String) -> Unit = {},
): StructuredResult {
    var prompt = structuredPrompt(request, schema)
    var result: StructuredResult = StructuredResult.Invalid(emptyList())
    repeat(attempts) {
        val reply = conversation.send(prompt)
        reply.pieces.collect { onPiece(it) }
        result = checkStructured(reply.text, schema)
        val invalid = result as? StructuredResult.Invalid ?: return result
        prompt = retryPrompt(invalid.violations)
    }
    return result
}

private const val MOST_VIOLATIONS = 8
private const val MOST_BEGINNINGS = 64 // each may be read to the end of the text

private fun attempt(read: () -> Json): Json? = try {
    read()
} catch (_: JsonException) {
    null
}
