package gemma.core

/**
 * Writes tools, calls and results in the syntax of Gemma 4's chat template. The exporter has compared the same writer in
 * Python with the template. Names and values stay text, whatever control token they name.
 */
internal class MarkedTools(private val format: ChatFormat, private val marks: ToolMarks, private val writer: ChatWriter) {
    /** What the model does in one step: its thought, calls, their results, and what it says. */
    private class Step(val turn: Message, val results: MutableList<Message> = ArrayList(), var content: String = turn.content)

    fun chat(turns: List<Message>, tools: Tools) {
        val system = turns.first().takeIf { it.role == Role.SYSTEM }
        val hasSystem = system != null || !tools.isEmpty
        writer.frame(if (hasSystem) format.system else format.first)
        system?.let { writer.content(format.content(it)) }
        tools.functions.forEach(::declaration)
        if (hasSystem) writer.frame(format.systemToUser)
        val steps = steps(if (system == null) turns else turns.drop(1))
        val asked = steps.indexOfLast { it.turn.role == Role.USER }
        steps.forEachIndexed { index, step ->
            step(step, index > asked)
            writer.frame(after(step, steps.getOrNull(index + 1)))
        }
    }

    fun declaration(function: JsonObject) = wrapped(marks.declaration) {
        val fields = function.fields
        writer.content(nameOf(function) + "{description:")
        quoted(fields["description"]?.let { textOf(it, "description", function) }.orEmpty())
        fields["parameters"]?.takeIf { it.isTrue }?.let { parameters(objectOf(it, "parameters", function), function) }
        fields["response"]?.let { response(fieldsOf(it), function) }
        writer.content("}")
    }

    private fun steps(turns: List<Message>): List<Step> {
        val steps = ArrayList<Step>()
        for (turn in turns) {
            val last = steps.lastOrNull()
            when {
                last != null && turn.role == Role.TOOL -> last.results += turn
                last != null && last.results.isNotEmpty() && turn.role == Role.ASSISTANT && turn.toolCalls.isEmpty() ->
                    last.content = strip("${last.content}\n${turn.content}")
                else -> steps += Step(turn)
            }
        }
        return steps
    }

    private fun step(step: Step, isNew: Boolean) {
        if (step.turn.thought.isNotEmpty() && isNew && step.turn.toolCalls.isNotEmpty()) wrapped(marks.thought) { writer.content(step.turn.thought) }
        for (call in step.turn.toolCalls) {
            wrapped(marks.call) {
                writer.content(call.name)
                value(call.arguments, quotedKeys = false)
            }
        }
        for (result in step.results) {
            wrapped(marks.response) {
                writer.content(result.name.orEmpty())
                val value = result.result ?: JsonString(result.content)
                value(value as? JsonObject ?: JsonObject(mapOf("value" to value)), quotedKeys = false)
            }
        }
        writer.content(said(step))
    }

    private fun said(step: Step) = format.content(Message(step.turn.role, step.content))

    /** The text between a step and the next one, or the reply. */
    private fun after(step: Step, next: Step?): String = when {
        step.turn.role == Role.USER -> if (next == null) format.reply else format.userToAssistant
        next == null -> if (said(step).isEmpty()) marks.reply else marks.replyAfterText
        next.turn.role == Role.ASSISTANT -> ""
        step.turn.toolCalls.isNotEmpty() && step.results.isEmpty() -> marks.unanswered
        else -> format.assistantToUser
    }

    /** Without a type the brace stays open, as in the template. */
    private fun parameters(schema: JsonObject, function: JsonObject) {
        writer.content(",parameters:{")
        schema.fields["properties"]?.takeIf { it.isTrue }?.let {
            writer.content("properties:{")
            properties(objectOf(it, "properties", function).fields, function)
            writer.content("},")
        }
        schema.fields["required"]?.takeIf { it.isTrue }?.let {
            required(it, function)
            writer.content(",")
        }
        schema.fields["type"]?.takeIf { it.isTrue }?.let {
            writer.content("type:")
            quoted(textOf(it, "type", function).uppercase())
            writer.content("}")
        }
    }

    /** For a type other than an object's the brace stays open, as in the template. */
    private fun response(fields: Map<String, Json>, function: JsonObject) {
        writer.content(",response:{")
        fields["description"]?.takeIf { it.isTrue }?.let {
            writer.content("description:")
            quoted(textOf(it, "description", function))
            writer.content(",")
        }
        if ((fields["type"] as? JsonString)?.text?.uppercase() == "OBJECT") {
            writer.content("type:")
            quoted("OBJECT")
            writer.content("}")
        }
    }

    private fun properties(properties: Map<String, Json>, function: JsonObject) = listed(sorted(properties)) { (name, schema) ->
        writer.content("$name:{")
        property(fieldsOf(schema), function)
        writer.content("}")
    }

    private fun property(fields: Map<String, Json>, function: JsonObject) {
        val type = fields["type"]?.let { textOf(it, "type", function).uppercase() }.orEmpty()
        fields["description"]?.takeIf { it.isTrue }?.let {
            writer.content("description:")
            quoted(textOf(it, "description", function))
            writer.content(",")
        }
        fields["enum"]?.takeIf { it.isTrue && type == "STRING" }?.let {
            writer.content("enum:")
            value(it, quotedKeys = true)
            writer.content(",")
        }
        (fields["items"] as? JsonObject)?.takeIf { it.isTrue && type == "ARRAY" }?.let { items(it, function) }
        if (fields["nullable"]?.isTrue == true) writer.content("nullable:true,")
        if (type == "OBJECT") objectProperties(fields, function)
        writer.content("type:")
        quoted(type)
    }

    private fun objectProperties(fields: Map<String, Json>, function: JsonObject) {
        writer.content("properties:{")
        properties((fields["properties"] as? JsonObject)?.fields ?: (fields - STANDARD), function)
        writer.content("},")
        fields["required"]?.takeIf { it.isTrue }?.let {
            required(it, function)
            writer.content(",")
        }
    }

    private fun items(items: JsonObject, function: JsonObject) {
        writer.content("items:{")
        listed(sorted(items.fields).filter { it.second != JsonNull }) { (name, item) ->
            when (name) {
                "properties" -> {
                    writer.content("properties:{")
                    properties(fieldsOf(item), function)
                    writer.content("}")
                }
                "required" -> required(item, function)
                "type" -> {
                    writer.content("type:")
                    quoted(textOf(item, "type", function).uppercase())
                }
                else -> {
                    writer.content("$name:")
                    value(item, quotedKeys = true)
                }
            }
        }
        writer.content("},")
    }

    private fun required(names: Json, function: JsonObject) {
        val items = (names as? JsonArray)?.items ?: throw unlike(names, "required", "a list of names", function)
        writer.content("required:[")
        listed(items) { quoted(textOf(it, "required", function)) }
        writer.content("]")
    }

    private fun value(value: Json, quotedKeys: Boolean) {
        when (value) {
            is JsonObject -> {
                writer.content("{")
                listed(sorted(value.fields)) { (name, item) ->
                    if (quotedKeys) quoted(name) else writer.content(name)
                    writer.content(":")
                    value(item, quotedKeys)
                }
                writer.content("}")
            }
            is JsonArray -> {
                writer.content("[")
                listed(value.items) { value(it, quotedKeys) }
                writer.content("]")
            }
            is JsonString -> quoted(value.text)
            else -> writer.content(value.pythonJson())
        }
    }

    private fun <T> listed(items: List<T>, write: (T) -> Unit) = items.forEachIndexed { index, item ->
        if (index > 0) writer.content(",")
        write(item)
    }

    private fun quoted(text: String) {
        writer.frame(marks.quote)
        writer.content(text)
        writer.frame(marks.quote)
    }

    private fun wrapped(marks: Pair<String, String>, write: () -> Unit) {
        writer.frame(marks.first)
        write()
        writer.frame(marks.second)
    }

    private companion object {
        val STANDARD = setOf("description", "type", "properties", "required", "nullable")
    }
}

private fun nameOf(function: JsonObject) = (function.fields.getValue("name") as JsonString).text

/** A schema that is no object, such as true, has nothing that is written. */
private fun fieldsOf(schema: Json): Map<String, Json> = (schema as? JsonObject)?.fields.orEmpty()

private fun objectOf(value: Json, field: String, function: JsonObject) =
    value as? JsonObject ?: throw unlike(value, field, "an object", function)

private fun textOf(value: Json, field: String, function: JsonObject): String =
    (value as? JsonString)?.text ?: throw unlike(value, field, "a text", function)

private fun unlike(value: Json, field: String, expected: String, function: JsonObject) = SchemaException(
    "the tool ${nameOf(function).take(40)} has \"$field\": ${value.write().take(40)}, but this model's template needs $expected there; change it in Tools",
)

/** Whether a template takes it for true. */
private val Json.isTrue: Boolean
    get() = when (this) {
        is JsonObject -> fields.isNotEmpty()
        is JsonArray -> items.isNotEmpty()
        is JsonString -> text.isNotEmpty()
        is JsonNumber -> value != 0.0
        is JsonBoolean -> value
        JsonNull -> false
    }

/** Fields by name without regard to case, as Jinja's `dictsort` has them. */
private fun sorted(fields: Map<String, Json>): List<Pair<String, Json>> =
    fields.toList().sortedWith { one, other -> comparePoints(one.first.lowercase(), other.first.lowercase()) }

private fun comparePoints(one: String, other: String): Int {
    var at = 0
    while (at < one.length && at < other.length) {
        val (left, right) = one.codePointAt(at) to other.codePointAt(at)
        if (left != right) return left.compareTo(right)
        at += Character.charCount(left)
    }
    return one.length.compareTo(other.length)
}
