package gemma.core

import java.io.InputStream
import java.nio.ByteBuffer
import java.nio.charset.CharacterCodingException

/** What the answers of a chat must be; with neither part, anything. */
data class AnswerFormat(
    val schema: Schema? = null, // answers are checked against it, and asked for again
    val grammar: GrammarFile? = null, // answers are held to it
) {
    val isAny: Boolean get() = schema == null && grammar == null

    /** For the empty input of a chat. */
    val hint: String
        get() = when {
            grammar != null -> "Ask for JSON as in ${grammar.name}"
            schema != null -> "Ask for JSON"
            else -> "Ask something"
        }

    /** The text of the schema to edit; without any format, one to begin with. */
    val schemaText: String get() = schema?.toString() ?: if (grammar == null) EXAMPLE_SCHEMA else ""

    internal fun json(): Json = JsonObject(
        mapOf(
            "schema" to (schema?.let { JsonString(it.toString()) } ?: JsonNull),
            "grammar" to (grammar?.let { JsonObject(mapOf("name" to JsonString(it.name), "text" to JsonString(it.text))) } ?: JsonNull),
        ),
    )

    companion object {
        /** The format that a user has entered; a blank schema is none. Throws JsonException or SchemaException. */
        fun parse(schema: String, grammar: GrammarFile?) = AnswerFormat(if (schema.isBlank()) null else Schema.parse(schema), grammar)

        internal fun read(json: JsonFields) = AnswerFormat(
            schema = json.orNull("schema")?.let { Schema.parse(it.string()) },
            grammar = json.orNull("grammar")?.let { GrammarFile(it.of("name").string(), it.of("text").string()) },
        )
    }
}

/**
 * A file that `gemma-runtime compile-schema` wrote, as the user has chosen it: it is not trusted. Its grammar is one of bytes,
 * so it is for every vocabulary. Throws SchemaException if it is no grammar.
 */
data class GrammarFile(val name: String, val text: String) {
    init {
        grammar()
    }

    /** The grammar, for one reply: it remembers what it has followed. */
    fun grammar(): ByteGrammar = try {
        ByteGrammar.parse(text)
    } catch (error: JsonException) {
        throw SchemaException("$name is not JSON: ${error.message}; $CHOOSE", error)
    } catch (error: SchemaException) {
        throw SchemaException("$name: ${error.message}", error)
    }

    companion object {
        const val MOST_BYTES = 1 shl 18 // a schema gives a few kB

        private const val CHOOSE = "choose a file that gemma-runtime compile-schema wrote"

        /** Reads a file to its end, or up to the most that it may have. Throws SchemaException, and what the stream throws. */
        fun read(name: String, file: InputStream): GrammarFile {
            val shown = oneLine(name).take(LONGEST_NAME)
            val bytes = file.use { it.readBytesUpTo(MOST_BYTES) }
                ?: throw SchemaException("$shown has more than $MOST_BYTES bytes, expected a few thousand; $CHOOSE")
            val text = try {
                Charsets.UTF_8.newDecoder().decode(ByteBuffer.wrap(bytes)).toString()
            } catch (error: CharacterCodingException) {
                throw SchemaException("$shown is not UTF-8; $CHOOSE", error)
            }
            return GrammarFile(shown, text)
        }

        private const val LONGEST_NAME = 60
    }
}

/** Asks for an answer in a format, in the place of the turn at `index`. Returns the outcome of the check as a message, if there is one. */
suspend fun askFormatted(
    conversation: Conversation,
    request: String,
    format: AnswerFormat,
    index: Int = conversation.turns.size,
    onReply: suspend (Reply) -> Unit = { reply -> reply.pieces.collect {} },
): String? {
    val grammar = format.grammar?.grammar()
    if (format.schema != null) return askStructured(conversation, request, format.schema, grammar = grammar, index = index, onReply = onReply).summary()
    onReply(if (grammar == null) conversation.sendAt(index, request) else conversation.sendAt(index, request, LONGEST_ANSWER, grammar))
    return null
}

/** Whether a reply that has ended has its format, for the status line; null if nothing holds it to one, or it never began. */
fun guarantee(format: AnswerFormat, reply: Reply): String? = format.grammar?.takeIf { reply.hasBegun }?.let { grammar ->
    when (reply.reason) {
        StopReason.STOP_TOKEN, StopReason.CONSTRAINT -> "The format is guaranteed by ${grammar.name}."
        else -> "The answer was cut, so it doesn't have the format of ${grammar.name}."
    }
}
