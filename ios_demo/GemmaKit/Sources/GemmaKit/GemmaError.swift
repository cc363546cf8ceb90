/// Everything that can go wrong. Each message says what was found, what was expected and what to do.
public enum GemmaError: Error, Equatable {
    /// A bundle is missing, altered, damaged, or of another schema.
    case bundle(String)
    /// The artifact can't be loaded or run.
    case session(String)
    /// The next token would not fit into the cache.
    case contextFull(String)
    /// Text can't be encoded, or the bundle has no tokenizer for phones.
    case tokenizer(String)
    /// A text is not JSON.
    case json(String)
    /// A JSON Schema says more than is understood here.
    case schema(String)

    public var message: String {
        switch self {
        case .bundle(let text), .session(let text), .contextFull(let text), .tokenizer(let text),
            .json(let text), .schema(let text):
            return text
        }
    }
}
