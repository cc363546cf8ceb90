package gemma.core

/** The root of all errors. Each message says what was found, what was expected and what to do. */
sealed class GemmaException(message: String, cause: Throwable? = null) : Exception(message, cause)

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
class SchemaException(message: String) : GemmaException(message)
