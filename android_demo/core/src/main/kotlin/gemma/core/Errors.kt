package gemma.core

/** Everything that can go wrong, as one tree. Each message says what was found, what was expected and what to do. */
sealed class GemmaException(message: String, cause: Throwable? = null) : Exception(message, cause)

/** A bundle is missing, altered, damaged, or of another schema. */
class BundleException(message: String, cause: Throwable? = null) : GemmaException(message, cause)

/** The artifact can't be loaded or run. */
open class SessionException(message: String, cause: Throwable? = null) : GemmaException(message, cause)

/** The next token would not fit into the cache. */
class ContextFullException(message: String) : SessionException(message)

/** Text can't be encoded, or the bundle has no tokenizer for phones. */
class TokenizerException(message: String) : GemmaException(message)

/** A text is not JSON. */
class JsonException(message: String) : GemmaException(message)

/** A JSON Schema says more than is understood here. */
class SchemaException(message: String) : GemmaException(message)
