package gemma.core

/** The root of all errors. Each message is one line that says what was found, what was expected and what to do. */
sealed class GemmaException(message: String, cause: Throwable? = null) : Exception(oneLine(message), cause)

/** A bundle is missing, altered, damaged, or has an unknown schema version. */
class BundleException(message: String, cause: Throwable? = null) : GemmaException(message, cause)

/** The artifact can't be loaded or run. */
open class SessionException(message: String, cause: Throwable? = null) : GemmaException(message, cause)

/** The next tokens don't fit into the cache. */
class ContextFullException(message: String) : SessionException(message)

/** A text can't be encoded, or the tokenizer file is damaged. */
class TokenizerException(message: String) : GemmaException(message)

/** A file of the app's own can't be written or read. */
class StorageException(message: String, cause: Throwable? = null) : GemmaException(message, cause)

/** A bundle can't be downloaded. */
class DownloadException(message: String, cause: Throwable? = null) : GemmaException(message, cause)

/** A text is not JSON. */
class JsonException(message: String) : GemmaException(message)

/**
 * What to tell the user about an error that ends a task; null if the task was only stopped.
 *
 * A runtime's library can fail with errors that are no GemmaException, and no error should end the app.
 */
fun messageFor(error: Throwable): String? = when (error) {
    is java.util.concurrent.CancellationException -> null
    is GemmaException -> error.message
    is OutOfMemoryError -> "The app has run out of memory. Close other apps, or export with a shorter --context."
    is LinkageError -> "A runtime's library can't be loaded on this phone: ${error.message}. Install the app again."
    else -> "Something unexpected went wrong: $error. Please report it."
}

/** A JSON Schema is not valid or uses a keyword that is not supported. */
class SchemaException(message: String, cause: Throwable? = null) : GemmaException(message, cause)

private const val LONGEST = 1500 // characters of a message
private const val START = 1000 // characters of a longer message that are kept before the gap
private val HIDDEN = listOf(Character.CONTROL, Character.FORMAT, Character.SURROGATE, Character.PRIVATE_USE, Character.UNASSIGNED)

/**
 * A message as one line, as the Python runtime writes it: it may quote a file that nobody trusts. White space becomes
 * blanks, other characters that are not shown become escapes, and a long message is cut in its middle.
 */
internal fun oneLine(message: String): String {
    val out = StringBuilder()
    var at = 0
    while (at < message.length) {
        val point = message.codePointAt(at)
        at += Character.charCount(point)
        when {
            Character.isWhitespace(point) || Character.isSpaceChar(point) -> if (out.isNotEmpty() && out.last() != ' ') out.append(' ')
            Character.getType(point).toByte() in HIDDEN -> out.append(String.format("\\u%04x", point))
            else -> out.appendCodePoint(point)
        }
    }
    val line = out.trimEnd().toString()
    return if (line.length <= LONGEST) line else "${line.take(START)} … ${line.takeLast(LONGEST - START)}"
}
