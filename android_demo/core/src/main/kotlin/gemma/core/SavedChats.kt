package gemma.core

import java.io.File

/** A chat as it is kept on storage: it outlives the model, the screens and the process. */
data class SavedChat(
    val id: String,
    val bundle: String, // name of the bundle's folder
    val settings: ChatSettings = ChatSettings(),
    val messages: List<Message> = emptyList(), // the turns of user, assistant and tools, forgotten ones too
    val forgotten: Int = 0, // how many of the first turns the model no longer sees
    val changedMs: Long = 0,
) {
    /** The first question, on one line. */
    val title: String get() = messages.firstOrNull()?.content?.trim()?.lineSequence()?.first()?.take(60).orEmpty().ifEmpty { "New chat" }

    internal fun json(): Json = JsonObject(
        mapOf(
            "version" to JsonNumber(VERSION.toDouble()),
            "bundle" to JsonString(bundle),
            "settings" to settings.json(),
            "messages" to JsonArray(messages.map(::messageJson)),
            "forgotten" to JsonNumber(forgotten.toDouble()),
            "changed_ms" to JsonNumber(changedMs.toDouble()),
        ),
    )

    internal companion object {
        const val VERSION = 1

        fun read(id: String, json: JsonFields): SavedChat {
            if (json.of("version").integer() != VERSION.toLong()) throw json.of("version").wrong("$VERSION")
            return SavedChat(
                id = id,
                bundle = json.of("bundle").string(),
                settings = ChatSettings.read(json.of("settings")),
                messages = json.of("messages").list(::readMessage),
                forgotten = json.of("forgotten").count(),
                changedMs = json.of("changed_ms").integer(),
            )
        }
    }
}

/** Values of calls and results are JSON in a string, which keeps their numbers as they were written. */
private fun messageJson(message: Message): Json {
    val fields = linkedMapOf<String, Json>("role" to JsonString(message.role.name.lowercase()), "content" to JsonString(message.content))
    if (message.toolCalls.isNotEmpty()) fields["calls"] = JsonArray(message.toolCalls.map(::callJson))
    if (message.thought.isNotEmpty()) fields["thought"] = JsonString(message.thought)
    message.name?.let { fields["name"] = JsonString(it) }
    message.result?.let { fields["result"] = JsonString(it.pythonJson()) }
    return JsonObject(fields)
}

private fun callJson(call: ToolCall) =
    JsonObject(mapOf("name" to JsonString(call.name), "arguments" to JsonString(call.arguments.pythonJson())))

private fun readMessage(json: JsonFields): Message {
    val role = json.of("role")
    val content = json.of("content").string()
    return when (role.string()) {
        "user" -> Message(Role.USER, content)
        "assistant" -> Message(
            Role.ASSISTANT, content, json.orNull("calls")?.list(::readCall).orEmpty(), json.orNull("thought")?.string().orEmpty(),
        )
        "tool" -> Message(Role.TOOL, content, name = json.of("name").string(), result = json.of("result").json())
        else -> throw role.wrong("user, assistant or tool")
    }
}

private fun readCall(json: JsonFields): ToolCall {
    val arguments = json.of("arguments")
    return ToolCall(json.of("name").string(), arguments.json() as? JsonObject ?: throw arguments.wrong("an object as JSON"))
}

/** A saved chat that goes on in a conversation, which began with its messages. */
class Talk(chat: SavedChat, val conversation: Conversation) {
    var chat = chat
        private set

    /** Whether it goes on with this chat. If only what answers must be has changed, it does: no token so far depends on that. */
    fun goesOnWith(other: SavedChat): Boolean {
        val isSame = other == chat.copy(settings = chat.settings.copy(format = other.settings.format))
        if (isSame) chat = other
        return isSame
    }

    /** Takes what the conversation has now over into the chat. */
    fun update(nowMs: Long): SavedChat {
        chat = chat.copy(messages = conversation.turns, forgotten = conversation.forgotten, changedMs = nowMs)
        return chat
    }
}

/** The saved chats of a folder, one file each. */
class SavedChats(private val folder: File) {
    /** Every chat that can be read, the newest first. */
    fun all(): List<SavedChat> = ids().mapNotNull { id ->
        try {
            load(id)
        } catch (_: StorageException) {
            null // `damaged` names it
        }
    }.sortedByDescending { it.changedMs }

    /** Names of chats whose files can't be read. They are kept until they are deleted. */
    fun damaged(): List<String> = ids() - all().map { it.id }.toSet()

    /** Throws StorageException if there is no such chat or its file is damaged. */
    fun load(id: String): SavedChat = try {
        SavedChat.read(id, JsonFields.parse(file(id).name, readText(file(id))))
    } catch (error: GemmaException) {
        throw StorageException("the chat $id can't be read; delete it (${error.message})", error)
    }

    /** Throws StorageException. A chat without a turn isn't kept. */
    fun save(chat: SavedChat) {
        if (chat.messages.isNotEmpty()) replaceText(file(chat.id), chat.json().write())
    }

    fun delete(id: String) {
        file(id).delete()
    }

    private fun ids(): List<String> =
        folder.listFiles().orEmpty().filter { it.name.endsWith(SUFFIX) }.map { it.name.removeSuffix(SUFFIX) }

    private fun file(id: String) = File(folder, id + SUFFIX)

    private companion object {
        const val SUFFIX = ".json"
    }
}
