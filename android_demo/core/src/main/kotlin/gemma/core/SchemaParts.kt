package gemma.core

/** A schema's keywords, parsed and checked. */
internal class SchemaParts(
    val types: List<String>?,
    val choices: List<List<Json>>, // of enum and of const; a value must be in each
    val anyOf: List<Schema>?,
    val properties: Map<String, Schema>,
    val required: List<String>,
    val closed: Boolean, // additionalProperties is false
    val items: Schema?,
    val numbers: Map<String, Double>, // of the limits, by keyword
)

private val TYPES = listOf("object", "array", "string", "number", "integer", "boolean", "null")
private val COUNTS = listOf("minLength", "maxLength", "minItems", "maxItems")
private val LIMITS = COUNTS + listOf("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
private val ANNOTATIONS = listOf("title", "description", "\$schema", "default", "examples") // don't restrict values
private val SUPPORTED = LIMITS + ANNOTATIONS +
    listOf("type", "enum", "const", "anyOf", "properties", "required", "additionalProperties", "items")

internal fun readParts(keywords: Map<String, Json>): SchemaParts {
    keywords.keys.firstOrNull { it !in SUPPORTED }?.let {
        val supported = (SUPPORTED - ANNOTATIONS.toSet()).joinToString()
        throw SchemaException("the schema's keyword \"$it\" is not supported; use only: $supported")
    }
    return SchemaParts(
        types = keywords["type"]?.let(::readTypes),
        choices = readChoices(keywords),
        anyOf = keywords["anyOf"]?.let { list("anyOf", it).map(Schema::of) },
        properties = fields("properties", keywords["properties"]).mapValues { Schema.of(it.value) },
        required = keywords["required"]?.let { list("required", it).map { name -> text("required", name) } }.orEmpty(),
        closed = keywords["additionalProperties"]?.let(::readClosed) ?: false,
        items = keywords["items"]?.let(Schema::of),
        numbers = keywords.filterKeys { it in LIMITS }.mapValues { (name, value) -> readLimit(name, value) },
    )
}

private fun wrong(name: String, value: Json, expected: String): Nothing =
    throw SchemaException("the schema's \"$name\" is ${value.write().take(40)}, expected $expected")

private fun list(name: String, value: Json): List<Json> = (value as? JsonArray)?.items ?: wrong(name, value, "a list")

private fun text(name: String, value: Json): String = (value as? JsonString)?.text ?: wrong(name, value, "a string")

private fun fields(name: String, value: Json?): Map<String, Json> = when (value) {
    null -> emptyMap()
    is JsonObject -> value.fields
    else -> wrong(name, value, "an object")
}

private fun readTypes(value: Json): List<String> {
    val types = if (value is JsonArray) value.items.map { text("type", it) } else listOf(text("type", value))
    types.firstOrNull { it !in TYPES }?.let { wrong("type", JsonString(it), TYPES.joinToString(" or ")) }
    return types
}

private fun readChoices(keywords: Map<String, Json>): List<List<Json>> =
    listOfNotNull(keywords["enum"]?.let { list("enum", it) }, keywords["const"]?.let(::listOf))

private fun readClosed(value: Json): Boolean =
    !((value as? JsonBoolean)?.value ?: wrong("additionalProperties", value, "true or false"))

private fun readLimit(name: String, value: Json): Double {
    val number = (value as? JsonNumber)?.value ?: wrong(name, value, "a number")
    if (name in COUNTS && (number < 0 || number != Math.rint(number))) wrong(name, value, "a whole number of at least 0")
    return number
}
