package gemma.core

/** How tools get into a prompt; written by the exporter. One of the two is null. */
data class ToolFormat(
    val prompt: String?, // joined to the system turn, with the tools as JSON after it; calls are JSON, results a turn of the user
    val marks: ToolMarks?, // the template's own tokens
) {
    internal companion object {
        fun read(json: JsonFields): ToolFormat {
            val format = ToolFormat(json.orNull("prompt")?.string(), json.orNull("marks")?.let(ToolMarks::read))
            if ((format.prompt == null) == (format.marks == null)) throw json.wrong("either a prompt or marks")
            return format
        }
    }
}

/** The texts around declarations, calls and results, as Gemma 4's template writes them. */
data class ToolMarks(
    val quote: String, // on both sides of a text
    val declaration: Pair<String, String>,
    val call: Pair<String, String>,
    val response: Pair<String, String>,
    val thought: Pair<String, String>, // it stays before its calls until the user's next turn
    val unanswered: String, // after calls without results, before the content of the user's next turn
    val reply: String, // after results, before what the model says to them
    val replyAfterText: String, // the same if it has said something beside the calls
    val waits: String, // the control token with which the model waits for results
) {
    /** Whether a text has calls. */
    internal fun opensIn(text: String): Boolean = call.first.removeSuffix("call:") in text

    internal companion object {
        fun read(json: JsonFields) = ToolMarks(
            quote = json.of("quote").text(),
            declaration = json.of("declaration").pair(),
            call = json.of("call").pair(),
            response = json.of("response").pair(),
            thought = json.of("thought").pair(),
            unanswered = json.of("unanswered").string(),
            reply = json.of("reply").string(),
            replyAfterText = json.of("reply_after_text").string(),
            waits = json.of("waits").text(),
        )
    }
}

/** The conversation as text: tools in the system turn, calls and results as JSON. */
internal fun withoutTools(turns: List<Message>, tools: Tools, prompt: String): List<Message> {
    val texts = ArrayList<Message>()
    if (!tools.isEmpty) {
        val system = turns.first().takeIf { it.role == Role.SYSTEM }?.content.orEmpty()
        texts += Message(Role.SYSTEM, strip("$system\n\n$prompt" + JsonArray(tools.functions).pythonJson(indented = true)))
    }
    for (turn in if (tools.isEmpty) turns else turns.dropWhile { it.role == Role.SYSTEM }) {
        when {
            turn.toolCalls.isNotEmpty() -> texts += Message(Role.ASSISTANT, strip("${turn.content}\n${callText(turn.toolCalls)}"))
            turn.role != Role.TOOL -> texts += turn
            else -> {
                val before = texts.last().takeIf { it.role == Role.USER } // the results of several calls are one turn
                if (before != null) texts.removeAt(texts.lastIndex)
                val result = "```tool_output\n${turn.content}\n```"
                texts += Message(Role.USER, if (before == null) result else "${before.content}\n$result")
            }
        }
    }
    return texts
}

private fun callText(calls: List<ToolCall>): String {
    val written = calls.map { JsonObject(mapOf("name" to JsonString(it.name), "parameters" to it.arguments)) }
    return (written.singleOrNull() ?: JsonArray(written)).pythonJson()
}
