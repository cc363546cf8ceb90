/// All errors. Each message says what was found, what was expected and what to do.
public enum GemmaError: Error, Equatable {
    /// A bundle is missing, altered, damaged, or has an unknown schema version.
    case bundle(String)
    /// The artifact can't be loaded or run.
    case session(String)
    /// The next tokens don't fit into the cache.
    case contextFull(String)
    /// A text can't be encoded, or the tokenizer file is damaged.
    case tokenizer(String)
    /// A bundle can't be downloaded.
    case download(String)
    /// A text is not JSON.
    case json(String)
    /// A JSON Schema is not valid or uses a keyword that is not supported.
    case schema(String)

    public var message: String {
        switch self {
        case .bundle(let text), .session(let text), .contextFull(let text), .tokenizer(let text),
            .download(let text), .json(let text), .schema(let text):
            return text
        }
    }
}
