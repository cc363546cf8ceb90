package gemma.core

/** A call that a reply asks for. Nothing is run by itself. */
data class ToolCall(val name: String, val arguments: JsonObject) {
    /** The call on one line, for a screen: `get_weather(city: "Rome")`. */
    val summary: String get() = name + arguments.fields.entries.joinToString(", ", "(", ")") { (key, value) -> "$key: ${value.pythonJson()}" }
}

/** Functions that the model may call, as JSON schemas of the form `{"type": "function", "function": {"name": …}}`. */
data class Tools(val schemas: List<JsonObject>) {
    val isEmpty: Boolean get() = schemas.isEmpty()

    val names: Set<String> get() = functions.map { (it.fields.getValue("name") as JsonString).text }.toSet()

    internal val functions: List<JsonObject> get() = schemas.map { it.fields.getValue("function") as JsonObject }

    companion object {
        val NONE = Tools(emptyList())

        /** Reads a JSON list of schemas, whole or only what is in `function`; a blank text has none. Throws SchemaException. */
        fun parse(text: String): Tools {
            if (strip(text).isEmpty()) return NONE
            val value = try {
                parseJson(text)
            } catch (error: JsonException) {
                throw SchemaException("the tools are ${error.message}; give a JSON list of schemas", error)
            }
            val items = (value as? JsonArray)?.items
                ?: throw SchemaException("the tools are ${value.write().take(40)}, expected a list of tools, each a JSON schema with a name")
            return Tools(items.mapIndexed { index, item -> schema(item, index) })
        }

        private fun schema(item: Json, index: Int): JsonObject {
            val given = item as? JsonObject
            val isBare = given != null && "function" !in given.fields
            val whole = if (isBare) JsonObject(mapOf("type" to JsonString("function"), "function" to item)) else given
            val function = whole?.fields?.get("function") as? JsonObject
            if (function?.fields?.get("name") !is JsonString) throw SchemaException("tool ${index + 1} has no name; expected a JSON schema")
            return whole
        }
    }
}

/** The calls of the last turn, which wait for their results. */
fun openCalls(turns: List<Message>): List<ToolCall> = turns.lastOrNull()?.toolCalls.orEmpty()

/** What a user gave as the result of a call: JSON, or else a text. */
fun parseResult(text: String): Json = try {
    parseJson(text)
} catch (_: JsonException) {
    JsonString(text)
}

/** The turn with the result of a call. */
internal fun resultTurn(call: ToolCall, result: Json) =
    Message(Role.TOOL, (result as? JsonString)?.text ?: result.pythonJson(), name = call.name, result = result)
