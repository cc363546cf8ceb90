package gemma.core

/** What a user can set for a chat. */
data class ChatSettings(
    val system: String = "", // blank for none
    val sampling: Sampling? = null, // null for the bundle's own values
    val thinking: Boolean = false,
    val roll: Boolean = false, // forget the oldest turns when the context is full
    val drafts: Boolean = false, // guess repeated passages, and check several tokens at once
    val seed: Int? = null, // the same question in the same chat gets the same answer; null: another one each time
    val format: AnswerFormat = AnswerFormat(), // what answers must be
    val tools: String = "", // a JSON list of schemas; blank for none
) {
    /** How to sample with a bundle; its authors' values unless the user has set others. */
    fun samplingFor(manifest: Manifest): Sampling = sampling ?: manifest.sampling ?: RECOMMENDED

    /**
     * A conversation that goes on from a chat with these settings; drafts are off where the graph gives the logits of one
     * token per run, which changes no token. Throws TokenizerException for thinking where the bundle can't think, and for tools
     * where it can't be given them, and SchemaException for tools that are none.
     */
    fun conversation(session: Session, codec: ChatCodec, manifest: Manifest, chat: SavedChat) = Conversation(
        session,
        codec,
        samplingFor(manifest).let { if (seed == null) Sampler(it) else Sampler(it, seed) },
        system.takeIf { it.isNotBlank() },
        roll,
        thinking,
        chat.messages,
        chat.forgotten,
        drafts && session.scoresTogether,
        Tools.parse(tools),
    )

    /** Why nothing can be asked with these settings; null if it can. */
    val conflict: String?
        get() = "This chat has tools, and answers in a format call none: tap Any answer in Schema, or No tools in Tools."
            .takeIf { !format.isAny && toolNames.isNotEmpty() }

    /** The names of the tools; none if they can't be read, which `conversation` refuses. */
    val toolNames: Set<String>
        get() = try {
            Tools.parse(tools).names
        } catch (_: SchemaException) {
            emptySet()
        }

    /** As JSON, for `parse`. */
    fun write(): String = json().write()

    internal fun json(): Json = JsonObject(
        mapOf(
            "system" to JsonString(system),
            "sampling" to (sampling?.let(::samplingJson) ?: JsonNull),
            "thinking" to JsonBoolean(thinking),
            "roll" to JsonBoolean(roll),
            "drafts" to JsonBoolean(drafts),
            "seed" to (seed?.let { JsonNumber(it.toDouble()) } ?: JsonNull),
            "format" to format.json(),
            "tools" to JsonString(tools),
        ),
    )

    companion object {
        /** By Gemma's authors, for bundles that say nothing. */
        val RECOMMENDED = Sampling(temperature = 1.0, topK = 64, topP = 0.95)

        internal fun read(json: JsonFields) = ChatSettings(
            system = json.of("system").string(),
            sampling = json.orNull("sampling")?.let(::readSampling),
            thinking = json.of("thinking").boolean(),
            roll = json.of("roll").boolean(),
            drafts = json.orNull("drafts")?.boolean() ?: false, // chats saved by an earlier version don't say
            seed = json.orNull("seed")?.count(),
            format = json.orNull("format")?.let(AnswerFormat::read) ?: AnswerFormat(),
            tools = json.orNull("tools")?.string().orEmpty(),
        )

        /** What `write` has written; as new if it can't be read. */
        fun parse(text: String): ChatSettings = try {
            read(JsonFields.parse("settings", text))
        } catch (_: GemmaException) {
            ChatSettings()
        }

        /** A seed; null for a blank text. Throws SessionException if it is no whole number that fits in 31 bits. */
        fun parseSeed(text: String): Int? {
            val given = text.trim().ifEmpty { return null }
            return given.toIntOrNull()?.takeIf { it >= 0 }
                ?: throw SessionException("seed is \"${text.take(20)}\", expected a whole number from 0 to ${Int.MAX_VALUE}, or nothing")
        }
    }
}

private fun samplingJson(sampling: Sampling) = JsonObject(
    mapOf(
        "temperature" to JsonNumber(sampling.temperature),
        "top_k" to JsonNumber(sampling.topK.toDouble()),
        "top_p" to JsonNumber(sampling.topP),
        "min_p" to JsonNumber(sampling.minP),
        "repetition_penalty" to JsonNumber(sampling.repetitionPenalty),
    ),
)
