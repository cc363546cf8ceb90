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
        told(violations) +
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

/** What came of asking, and how often was asked. */
data class StructuredAnswer(val result: StructuredResult, val attempts: Int) {
    /** The outcome, for whoever asked. */
    fun inWords(): String = when (result) {
        is StructuredResult.Valid -> "The answer matches the schema (${tries()}): ${result.value.write()}"
        is StructuredResult.Invalid -> "The answer does not match the schema (${tries()}):\n${told(result.violations)}"
    }

    private fun tries(): String = if (attempts == 1) "first try" else "$attempts tries"
}

/**
 * Asks until the answer is right, at most `attempts` times; the last result either way.
 *
 * An answer ends after `maxNewTokens`: a model that never ends one would fill the context at once.
 */
suspend fun askStructured(
    conversation: Conversation,
    request: String,
    schema: Schema,
    attempts: Int = 3,
    maxNewTokens: Int = 512,
    onReply: suspend (Reply) -> Unit = { reply -> reply.pieces.collect {} },
): StructuredAnswer {
    var prompt = structuredPrompt(request, schema)
    var answer = StructuredAnswer(StructuredResult.Invalid(emptyList()), 0)
    while (answer.attempts < attempts) {
        val reply = conversation.send(prompt, maxNewTokens)
        onReply(reply)
        answer = StructuredAnswer(checkStructured(reply.text, schema), answer.attempts + 1)
        val invalid = answer.result as? StructuredResult.Invalid ?: return answer
        prompt = retryPrompt(invalid.violations)
    }
    return answer
}

/** A schema to begin with. */
const val EXAMPLE_SCHEMA = """{
  "type": "object",
  "properties": {
    "answer": {"type": "string"},
    "confidence": {"type": "number", "minimum": 0, "maximum": 1}
  },
  "required": ["answer", "confidence"],
  "additionalProperties": false
}"""

private const val MOST_VIOLATIONS = 8
private const val MOST_BEGINNINGS = 64 // each may be read to the end of the text

private fun told(violations: List<Violation>): String =
    violations.take(MOST_VIOLATIONS).joinToString("\n") { "- ${it.path}: ${it.message}" }

private fun attempt(read: () -> Json): Json? = try {
    read()
} catch (_: JsonException) {
    null
}
