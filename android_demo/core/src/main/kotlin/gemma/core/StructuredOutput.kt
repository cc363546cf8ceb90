package gemma.core

/** A model's answer, checked against a schema. */
sealed interface StructuredResult {
    data class Valid(val value: Json) : StructuredResult

    data class Invalid(val violations: List<Violation>) : StructuredResult
}

/** The request and the format that its answer must have. */
fun structuredPrompt(request: String, schema: Schema): String =
    "$request\n\nAnswer with JSON alone, no other words, that matches this JSON Schema:\n$schema"

/** A message without what `structuredPrompt` has added to it for this schema. */
fun requestIn(message: String, schema: Schema?): String =
    if (schema == null) message else message.removeSuffix(structuredPrompt("", schema))

/** The place of the last question that the user asked; null if there is none. A request for a corrected answer is none. */
fun lastQuestion(turns: List<Message>): Int? =
    turns.indices.lastOrNull { turns[it].role == Role.USER && !turns[it].content.startsWith(RETRY) }

/** The message to the model after an invalid answer. */
fun retryPrompt(violations: List<Violation>): String =
    RETRY +
        bulleted(violations) +
        "\nAnswer again with the corrected JSON alone."

/** Finds, parses and validates the JSON in a model's text. */
fun checkStructured(text: String, schema: Schema): StructuredResult {
    val value = extractJson(text)
        ?: return StructuredResult.Invalid(listOf(Violation("$", "the answer has no complete JSON value")))
    val violations = schema.validate(value)
    return if (violations.isEmpty()) StructuredResult.Valid(value) else StructuredResult.Invalid(violations)
}

/** The whole text as JSON, or the first object or array in it; null if there is none. */
fun extractJson(text: String): Json? {
    attempt { parseJson(text) }?.let { return it }
    return text.indices.asSequence()
        .filter { text[it] == '{' || text[it] == '[' }
        .take(MAX_STARTS)
        .mapNotNull { start -> attempt { JsonParser(text, start).value(0) } }
        .firstOrNull()
}

/** The last result and the number of attempts it took. */
data class StructuredAnswer(val result: StructuredResult, val attempts: Int) {
    /** The outcome as a message for the user. */
    fun summary(): String = when (result) {
        is StructuredResult.Valid -> "The answer matches the schema (${tries()}): ${result.value.write()}"
        is StructuredResult.Invalid -> "The answer does not match the schema (${tries()}):\n${bulleted(result.violations)}"
    }

    private fun tries(): String = if (attempts == 1) "first try" else "$attempts tries"
}

/**
 * Asks until the answer is valid, at most `attempts` times, and returns the last result in any case. The request takes
 * the place of the turn at `index`, as in `sendAt`.
 *
 * An answer is cut off after `maxNewTokens`, because a model that doesn't stop would fill the context. With the
 * schema's compiled grammar, an answer that is not cut off is valid at the first attempt.
 */
suspend fun askStructured(
    conversation: Conversation,
    request: String,
    schema: Schema,
    attempts: Int = 3,
    maxNewTokens: Int = LONGEST_ANSWER,
    grammar: ByteGrammar? = null,
    index: Int = conversation.turns.size,
    onReply: suspend (Reply) -> Unit = { reply -> reply.pieces.collect {} },
): StructuredAnswer {
    var prompt = structuredPrompt(request, schema)
    var answer = StructuredAnswer(StructuredResult.Invalid(emptyList()), 0)
    while (answer.attempts < attempts) {
        val place = if (answer.attempts == 0) index else conversation.turns.size
        val reply = conversation.sendAt(place, prompt, maxNewTokens, grammar)
        onReply(reply)
        answer = StructuredAnswer(checkStructured(reply.text, schema), answer.attempts + 1)
        val invalid = answer.result as? StructuredResult.Invalid ?: return answer
        prompt = retryPrompt(invalid.violations)
    }
    return answer
}

/** The schema that the app suggests first. */
const val EXAMPLE_SCHEMA = """{
  "type": "object",
  "properties": {
    "answer": {"type": "string"},
    "confidence": {"type": "number", "minimum": 0, "maximum": 1}
  },
  "required": ["answer", "confidence"],
  "additionalProperties": false
}"""

/** How many tokens an answer may have that must end by itself: a model that doesn't stop would fill the context. */
internal const val LONGEST_ANSWER = 512

private const val RETRY = "That answer does not match the schema:\n"
private const val MAX_VIOLATIONS = 8
private const val MAX_STARTS = 64 // each attempt may read to the end of the text

private fun bulleted(violations: List<Violation>): String =
    violations.take(MAX_VIOLATIONS).joinToString("\n") { "- ${it.path}: ${it.message}" }

private fun attempt(read: () -> Json): Json? = try {
    read()
} catch (_: JsonException) {
    null
}
