import Foundation

/// What the answers of a chat must be; with neither part, anything.
public struct AnswerFormat: Codable, Equatable, Sendable {
    public var schema: Schema?  // answers are checked against it, and asked for again
    public var grammar: GrammarFile?  // answers are held to it

    public init(schema: Schema? = nil, grammar: GrammarFile? = nil) {
        self.schema = schema
        self.grammar = grammar
    }

    /// The format that a user has entered; a blank schema is none. Throws a JSON or schema error.
    public init(schema text: String, grammar: GrammarFile?) throws {
        self.init(schema: strip(text).isEmpty ? nil : try Schema(text), grammar: grammar)
    }

    public var isAny: Bool { schema == nil && grammar == nil }

    /// For the empty input of a chat.
    public var hint: String {
        if let grammar { return "Ask for JSON as in \(grammar.name)" }
        return schema == nil ? "Ask something" : "Ask for JSON"
    }

    /// The text of the schema to edit; without any format, one to begin with.
    public var schemaText: String { schema?.description ?? (grammar == nil ? exampleSchema : "") }
}

extension Schema: Codable {
    public convenience init(from decoder: Decoder) throws {
        try self.init(decoder.singleValueContainer().decode(String.self))
    }

    public func encode(to encoder: Encoder) throws {
        var text = encoder.singleValueContainer()
        try text.encode(description)
    }
}

/// A file that `gemma-runtime compile-schema` wrote, as the user has chosen it: it is not trusted. Its grammar is one of bytes,
/// so it is for every vocabulary.
public struct GrammarFile: Codable, Equatable, Sendable {
    public static let mostBytes = 1 << 18  // a schema gives a few kB

    public let name: String
    public let text: String

    /// Throws a schema error if it is no grammar.
    public init(name: String, text: String) throws {
        self.name = name
        self.text = text
        _ = try grammar()
    }

    /// Throws a schema error.
    public init(name: String, _ file: Data) throws {
        let shown = String(oneLine(name).prefix(longestName))
        guard file.count <= Self.mostBytes else {
            throw GemmaError.schema("\(shown) has more than \(Self.mostBytes) bytes, expected a few thousand; \(choose)")
        }
        guard let text = String(data: file, encoding: .utf8) else {
            throw GemmaError.schema("\(shown) is not UTF-8; \(choose)")
        }
        try self.init(name: shown, text: text)
    }

    /// Reads a file to its end, or up to the most that it may have. Throws a schema error, and what the system throws.
    public init(_ file: URL) throws {
        let handle = try FileHandle(forReadingFrom: file)
        defer { try? handle.close() }
        try self.init(name: file.lastPathComponent, handle.read(upToCount: Self.mostBytes + 1) ?? Data())
    }

    public init(from decoder: Decoder) throws {
        let fields = try decoder.container(keyedBy: CodingKeys.self)
        try self.init(name: fields.decode(String.self, forKey: .name), text: fields.decode(String.self, forKey: .text))
    }

    /// The grammar, for one reply: it remembers what it has followed.
    public func grammar() throws -> ByteGrammar {
        do {
            return try ByteGrammar(text)
        } catch GemmaError.json(let message) {
            throw GemmaError.schema("\(name) is not JSON: \(message); \(choose)")
        } catch GemmaError.schema(let message) {
            throw GemmaError.schema("\(name): \(message)")
        }
    }
}

private let choose = "choose a file that gemma-runtime compile-schema wrote"
private let longestName = 60

/// Asks for an answer in a format, in the place of the turn at `index`, or else last. Returns the outcome of the check as a
/// message, if there is one.
public func askFormatted(
    _ conversation: Conversation, _ request: String, _ format: AnswerFormat, at index: Int? = nil,
    isolation: isolated (any Actor)? = #isolation, onEvent: (Reply, ReplyEvent) -> Void = { _, _ in }
) async throws -> String? {
    let grammar = try format.grammar?.grammar()
    if let schema = format.schema {
        return try await askStructured(
            conversation, request, schema, grammar: grammar, at: index, isolation: isolation, onEvent: onEvent
        ).summary
    }
    let place = index ?? conversation.turns.count
    let most = grammar == nil ? nil : longestAnswer
    try await conversation.send(request, at: place, maxNewTokens: most, grammar: grammar).run(onEvent: onEvent)
    return nil
}

/// Whether a reply that has ended has its format, for the status line; nil if nothing holds it to one, or it never began.
public func guarantee(_ format: AnswerFormat, _ reply: Reply) -> String? {
    guard let grammar = format.grammar, reply.hasBegun else { return nil }
    switch reply.reason {
    case .stopToken, .constraint: return "The format is guaranteed by \(grammar.name)."
    default: return "The answer was cut, so it doesn't have the format of \(grammar.name)."
    }
}
