package gemma.core

/** TOOL: a turn with what a tool has returned. */
enum class Role { SYSTEM, USER, ASSISTANT, TOOL }

data class Message(
    val role: Role,
    val content: String,
    val toolCalls: List<ToolCall> = emptyList(), // of the assistant alone
    val thought: String = "", // before the calls; a template may keep it until the user's next turn
    val name: String? = null, // of the tool whose result the content is
    val result: Json? = null, // the content as JSON
)

/** The text that a chat template puts before, between and after the messages; written by the exporter. */
data class ChatFormat(
    val first: String,
    val userToAssistant: String,
    val assistantToUser: String,
    val reply: String,
    val system: String,
    val systemToUser: String,
    val trimUser: Boolean,
    val trimAssistant: Boolean,
    val trimSystem: Boolean,
    val replyAfter: String, // of an earlier reply only the text after the last of these counts; "" if all of it counts
    val replyWithout: Pair<String, String>?, // of an earlier reply, what is between these two is left out
    val thinking: ChatFormat?, // the format that asks for thoughts; null if there is none
    val tools: ToolFormat?, // null if this model can't be given tools, or the bundle is older than tools on phones
) {
    /** What counts of an earlier reply. */
    internal fun withoutThoughts(reply: String): String {
        val kept = if (replyAfter.isEmpty()) reply else reply.substringAfterLast(replyAfter)
        val (opens, closes) = replyWithout ?: return kept
        return kept.split(closes).joinToString("") { it.substringBefore(opens) }
    }

    companion object {
        /** Throws BundleException if the bundle has no chat format, because its template can't be expressed as one. */
        fun load(bundle: Bundle): ChatFormat = parse(readText(bundle.path("chat_format")))

        fun parse(text: String): ChatFormat = read(JsonFields.parse("chat.json", text))

        internal fun read(json: JsonFields): ChatFormat =
            ChatFormat(
                first = json.of("first").string(),
                userToAssistant = json.of("user_to_assistant").string(),
                assistantToUser = json.of("assistant_to_user").string(),
                reply = json.of("reply").string(),
                system = json.of("system").string(),
                systemToUser = json.of("system_to_user").string(),
                trimUser = json.of("trim_user").boolean(),
                trimAssistant = json.of("trim_assistant").boolean(),
                trimSystem = json.of("trim_system").boolean(),
                replyAfter = json.of("reply_after").string(),
                replyWithout = json.orNull("reply_without")?.pair(),
                thinking = json.orNull("thinking")?.let(::read),
                tools = json.orNull("tools")?.let(ToolFormat::read),
            )
    }
}

/**
 * Token ids of a conversation up to the start of the model's next turn, with bos where the template writes it.
 *
 * Message contents, tools, calls and results can't become control tokens. A blank system turn is left out.
 */
fun encodeChat(tokenizer: Tokenizer, format: ChatFormat, messages: List<Message>, tools: Tools = Tools.NONE): IntArray {
    val turns = messages.filterNot { it.role == Role.SYSTEM && strip(it.content).isEmpty() }
    checkTurns(turns)
    val writer = ChatWriter(tokenizer)
    if (tools.isEmpty && turns.none { it.role == Role.TOOL || it.toolCalls.isNotEmpty() }) {
        writer.chat(format, turns)
        return writer.finish()
    }
    val how = format.tools ?: throw TokenizerException(NO_TOOLS)
    if (how.marks != null) {
        MarkedTools(format, how.marks, writer).chat(turns, tools)
    } else {
        writer.chat(format, withoutTools(turns, tools, how.prompt.orEmpty()))
    }
    return writer.finish()
}

private const val NO_TOOLS = "this bundle can't be given tools: phones can't write them as its chat template does, or it is of an earlier " +
    "version; tap No tools in Tools and start a new chat, or export the model again"

/** Throws TokenizerException if this model can't be given tools, SchemaException if its template can't write these. */
fun checkTools(tokenizer: Tokenizer, format: ChatFormat, tools: Tools) {
    if (tools.isEmpty) return
    val marks = (format.tools ?: throw TokenizerException(NO_TOOLS)).marks ?: return
    val writer = MarkedTools(format, marks, ChatWriter(tokenizer))
    tools.functions.forEach(writer::declaration)
}

internal fun ChatFormat.content(turn: Message): String {
    val text = if (turn.role == Role.ASSISTANT) withoutThoughts(turn.content) else turn.content
    return if (trims(turn.role)) strip(text) else text
}

private fun ChatFormat.trims(role: Role): Boolean = when (role) {
    Role.SYSTEM -> trimSystem
    Role.USER -> trimUser
    Role.ASSISTANT, Role.TOOL -> trimAssistant
}

private fun ChatFormat.after(role: Role): String = when (role) {
    Role.SYSTEM -> systemToUser
    Role.USER -> userToAssistant
    Role.ASSISTANT, Role.TOOL -> assistantToUser
}

/** Encodes the template's text and the messages between two control tokens together, as one text. */
internal class ChatWriter(private val tokenizer: Tokenizer) {
    private val tokens = ArrayList<Int>()
    private val text = StringBuilder()

    /** Turns without tools. */
    fun chat(format: ChatFormat, turns: List<Message>) {
        frame(if (turns[0].role == Role.SYSTEM) format.system else format.first)
        turns.forEachIndexed { index, turn ->
            content(format.content(turn))
            frame(if (index == turns.lastIndex) format.reply else format.after(turn.role))
        }
    }

    fun content(added: String) {
        text.append(added)
    }

    fun frame(template: String) {
        for (part in tokenizer.splitControl(template)) {
            when (part) {
                is TextPart.Text -> text.append(part.text)
                is TextPart.Control -> {
                    flush()
                    tokens += part.token
                }
            }
        }
    }

    fun finish(): IntArray {
        flush()
        return tokens.toIntArray()
    }

    private fun flush() {
        tokens += tokenizer.encode(text.toString()).asList()
        text.setLength(0)
    }
}

private fun checkTurns(turns: List<Message>) {
    val rest = if (turns.firstOrNull()?.role == Role.SYSTEM) turns.drop(1) else turns
    if (rest.isEmpty()) throw TokenizerException("the conversation has no user turn; it must begin with one")
    var expected = listOf(Role.USER)
    rest.forEachIndexed { index, turn ->
        if (turn.role !in expected) {
            throw TokenizerException(
                "turn ${index + 1} is by ${turn.role}, expected ${expected.last()}: after an optional system turn, " +
                    "user and assistant alternate, and results follow calls",
            )
        }
        expected = when {
            turn.role == Role.USER -> listOf(Role.ASSISTANT)
            turn.role == Role.TOOL -> listOf(Role.TOOL, Role.ASSISTANT)
            turn.toolCalls.isNotEmpty() -> listOf(Role.TOOL, Role.USER)
            else -> listOf(Role.USER)
        }
    }
    if (rest.last().role == Role.ASSISTANT) throw TokenizerException("the last turn is the assistant's, expected the user's; ask something")
}

/** Text without leading and trailing white space, as Python and Jinja define it. */
internal fun strip(text: String): String = text.trim { it in WHITE_SPACE }

internal const val WHITE_SPACE = "\t\n\u000b\u000c\r\u001c\u001d\u001e\u001f \u0085\u00a0\u1680" +
    "\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
