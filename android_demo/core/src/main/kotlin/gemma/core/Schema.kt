package gemma.core

/** A path in a value, such as `$.age`, and what is wrong there. */
data class Violation(val path: String, val message: String)

/**
 * A JSON Schema with these keywords: type, enum, const, anyOf, properties, required, additionalProperties,
 * items, and the limits of numbers, strings and arrays. Other keywords are refused, since ignoring one would
 * accept wrong values.
 */
class Schema private constructor(private val keywords: Map<String, Json>, private val parts: SchemaParts) {
    /** Everything that is wrong with a value; empty if it is valid. */
    fun validate(value: Json): List<Violation> = check("$", value)

    private fun check(path: String, value: Json): List<Violation> {
        val typeProblem = typeProblem(value)
        val problems = if (typeProblem != null) listOf(typeProblem) else sizeProblems(value)
        return problems.map { Violation(path, it) } + choiceProblems(path, value) + childProblems(path, value)
    }

    private fun typeProblem(value: Json): String? {
        val types = parts.types ?: return null
        return if (types.any { hasType(value, it) }) null else "expected ${types.joinToString(" or ")}"
    }

    private fun sizeProblems(value: Json): List<String> = when (value) {
        is JsonNumber -> limits(value.value, "", "minimum", "maximum") + exclusive(value.value)
        is JsonString -> limits(codePoints(value.text), " characters", "minLength", "maxLength")
        is JsonArray -> limits(value.items.size.toDouble(), " items", "minItems", "maxItems")
        is JsonObject -> parts.required.filter { it !in value.fields }.map { "\"$it\" is missing" }
        else -> emptyList()
    }

    private fun limits(size: Double, unit: String, minimum: String, maximum: String): List<String> = listOfNotNull(
        parts.numbers[minimum]?.takeIf { size < it }?.let { "expected at least ${number(it)}$unit" },
        parts.numbers[maximum]?.takeIf { size > it }?.let { "expected at most ${number(it)}$unit" },
    )

    private fun exclusive(value: Double): List<String> = listOfNotNull(
        parts.numbers["exclusiveMinimum"]?.takeIf { value <= it }?.let { "expected more than ${number(it)}" },
        parts.numbers["exclusiveMaximum"]?.takeIf { value >= it }?.let { "expected less than ${number(it)}" },
    )

    private fun choiceProblems(path: String, value: Json): List<Violation> {
        val missed = parts.choices.filter { value !in it }.map { Violation(path, "expected one of ${JsonArray(it).write()}") }
        val alternatives = parts.anyOf
        return missed + listOfNotNull(
            if (alternatives != null && alternatives.all { it.check(path, value).isNotEmpty() }) {
                Violation(path, "expected one of: ${alternatives.joinToString { JsonObject(it.keywords).write() }}")
            } else {
                null
            },
        )
    }

    private fun childProblems(path: String, value: Json): List<Violation> = when (value) {
        is JsonObject -> value.fields.flatMap { (name, child) ->
            val schema = parts.properties[name]
            when {
                schema != null -> schema.check("$path.$name", child)
                parts.closed -> listOf(Violation("$path.$name", "is not expected here"))
                else -> emptyList()
            }
        }
        is JsonArray -> parts.items?.let { schema ->
            value.items.flatMapIndexed { index, child -> schema.check("$path[$index]", child) }
        }.orEmpty()
        else -> emptyList()
    }

    override fun toString(): String = JsonObject(keywords).write()

    override fun equals(other: Any?): Boolean = other is Schema && keywords == other.keywords

    override fun hashCode(): Int = keywords.hashCode()

    companion object {
        /** Throws JsonException if the text is not JSON, SchemaException if it is not a supported schema. */
        fun parse(text: String): Schema = of(parseJson(text))

        fun of(json: Json): Schema {
            val keywords = (json as? JsonObject)?.fields
                ?: throw SchemaException("the schema is ${json.write().take(40)}, expected an object")
            return Schema(keywords, readParts(keywords))
        }
    }
}

private fun hasType(value: Json, type: String): Boolean = when (type) {
    "object" -> value is JsonObject
    "array" -> value is JsonArray
    "string" -> value is JsonString
    "number" -> value is JsonNumber
    "integer" -> value is JsonNumber && value.value == Math.rint(value.value)
    "boolean" -> value is JsonBoolean
    else -> value == JsonNull
}

private fun number(value: Double): String = JsonNumber(value).write()

private fun codePoints(text: String): Double = text.codePointCount(0, text.length).toDouble()
