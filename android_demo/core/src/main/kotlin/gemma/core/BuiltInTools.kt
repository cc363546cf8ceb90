package gemma.core

import java.text.SimpleDateFormat
import java.util.Date
import java.util.Locale
import java.util.TimeZone

/** How many times in a row the app answers calls itself, before it asks the user. */
const val MOST_BUILT_IN_ROUNDS = 5

/**
 * The result of a call that the app answers itself; null for all others, whose results the user is asked for.
 *
 * This is the place for an app's own functions. Their arguments come from a model: check them, and ask the user before
 * anything that can't be undone.
 */
fun builtInResult(call: ToolCall, now: Date, zone: TimeZone): Json? = when (call.name) {
    "current_time" -> currentTime(now, zone)
    else -> null
}

/** Gives the results of calls that the app answers itself, as long as there are no others, nor any of tools that the chat lacks. */
suspend fun answerBuiltIn(
    conversation: Conversation,
    result: (ToolCall) -> Json?,
    onReply: suspend (Reply) -> Unit = { reply -> reply.pieces.collect {} },
) {
    val names = conversation.tools.names
    repeat(MOST_BUILT_IN_ROUNDS) {
        val results = openCalls(conversation.turns).map { call -> if (call.name in names) result(call) else null }
        if (results.isEmpty() || null in results) return
        onReply(conversation.sendResults(results.filterNotNull()))
    }
}

private fun currentTime(now: Date, zone: TimeZone): Json {
    fun format(pattern: String) = JsonString(SimpleDateFormat(pattern, Locale.ENGLISH).apply { timeZone = zone }.format(now))
    return JsonObject(
        mapOf("time" to format("yyyy-MM-dd'T'HH:mm:ssXXX"), "weekday" to format("EEEE"), "zone" to JsonString(zone.id)),
    )
}

/** A reply as a screen shows it: its text, and below it the calls, as markdown. */
fun shownReply(text: String, calls: List<ToolCall>): String {
    if (calls.isEmpty()) return text
    val title = if (calls.size == 1) "Calls a tool:" else "Calls ${calls.size} tools:"
    return listOf(text, "$title\n\n```\n${calls.joinToString("\n") { it.summary }}\n```").filter { it.isNotBlank() }.joinToString("\n\n")
}

/** The turn of a tool as a screen shows it. */
fun shownResult(turn: Message): String = "${turn.name} returned: ${turn.content}"

/** The tools that the app suggests first: it answers the second one itself. */
const val EXAMPLE_TOOLS = """[
  {
    "name": "get_weather",
    "description": "Gets the weather in a city.",
    "parameters": {
      "type": "object",
      "properties": {
        "city": {"type": "string", "description": "The city, e.g. Rome."},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}
      },
      "required": ["city"]
    }
  },
  {
    "name": "current_time",
    "description": "Gets the date, the time and the time zone of the phone.",
    "parameters": {"type": "object", "properties": {}}
  }
]"""
