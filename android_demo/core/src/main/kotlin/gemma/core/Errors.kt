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

/** A text is not JSON. */
class JsonException(message: String) : GemmaException(message)

/** A JSON Schema is not valid or uses a keyword that is not supported. */
class SchemaException(message: String) : GemmaException(message)
