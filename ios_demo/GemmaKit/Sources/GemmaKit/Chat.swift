import Foundation

public enum Role: String, Codable, Sendable {
    case system, user, assistant
}

public struct Message: Equatable, Codable, Sendable {
    public let role: Role
    public let content: String

    public init(_ role: Role, _ content: String) {
        self.role = role
        self.content = content
    }
}

/// The text that a chat template puts before, between and after the messages; written by the exporter.
public struct ChatFormat {
    let first: String
    let userToAssistant: String
    let assistantToUser: String
    let reply: String
    let system: String
    let systemToUser: String
    let trims: [Role: Bool]
    let replyAfter: String  // of an earlier reply only the text after the last of these counts; "" if all of it counts
    /// Of an earlier reply, what is between these two is left out; nil if nothing is.
    let replyWithout: (opens: String, closes: String)?
    private let withThinking: [ChatFormat]  // one or none; an array, because a struct can't contain itself

    /// Throws a bundle error if the bundle has no chat format, because its template can't be expressed as one.
    public init(_ bundle: ModelBundle) throws {
        try self.init(readFile(bundle.path("chat_format")))
    }

    public init(_ file: Data) throws {
        try self.init(JSONFields.parse(file: "chat.json", file))
    }

    private init(_ json: JSONFields) throws {
        first = try json.of("first").string()
        userToAssistant = try json.of("user_to_assistant").string()
        assistantToUser = try json.of("assistant_to_user").string()
        reply = try json.of("reply").string()
        system = try json.of("system").string()
        systemToUser = try json.of("system_to_user").string()
        trims = [
            .system: try json.of("trim_system").boolean(),
            .user: try json.of("trim_user").boolean(),
            .assistant: try json.of("trim_assistant").boolean(),
        ]
        replyAfter = try json.of("reply_after").string()
        replyWithout = try json.orNil("reply_without").map(readPair)
        withThinking = try json.orNil("thinking").map { [try ChatFormat($0)] } ?? []
    }

    /// The format that asks the model to think before it answers; nil if the template has none.
    public var thinking: ChatFormat? { withThinking.first }

    fileprivate func content(_ turn: Message) -> String {
        let text = turn.role == .assistant ? withoutThoughts(turn.content) : turn.content
        return trims[turn.role] == true ? strip(text) : text
    }

    private func withoutThoughts(_ reply: String) -> String {
        let text = textAfter(replyAfter, reply)
        guard let (opens, closes) = replyWithout else { return text }
        return split(text, closes).map { split($0, opens)[0] }.joined()
    }

    fileprivate func after(_ role: Role) -> String {
        switch role {
        case .system: return systemToUser
        case .user: return userToAssistant
        case .assistant: return assistantToUser
        }
    }
}

private func readPair(_ json: JSONFields) throws -> (opens: String, closes: String) {
    let texts = try json.list { try $0.string() }
    guard texts.count == 2, !texts.contains("") else { throw json.wrong("two texts") }
    return (texts[0], texts[1])
}

/// Token ids of a conversation up to the start of the model's next turn, with bos where the template writes it.
///
/// Message contents can't become control tokens. A blank system turn is left out.
public func encodeChat(_ tokenizer: Tokenizer, _ format: ChatFormat, _ messages: [Message]) throws -> [Int] {
    let turns = messages.filter { $0.role != .system || !strip($0.content).isEmpty }
    try checkTurns(turns)
    var writer = ChatWriter(tokenizer: tokenizer)
    try writer.frame(turns[0].role == .system ? format.system : format.first)
    for (index, turn) in turns.enumerated() {
        writer.text += format.content(turn)
        try writer.frame(index == turns.count - 1 ? format.reply : format.after(turn.role))
    }
    try writer.flush()
    return writer.tokens
}

/// Encodes the template's text and the messages between two control tokens together, as one text.
private struct ChatWriter {
    let tokenizer: Tokenizer
    var tokens: [Int] = []
    var text = ""

    mutating func frame(_ template: String) throws {
        for part in tokenizer.splitControl(template) {
            switch part {
            case .text(let added): text += added
            case .control(let token):
                try flush()
                tokens.append(token)
            }
        }
    }

    mutating func flush() throws {
        tokens += try tokenizer.encode(text)
        text = ""
    }
}

private func checkTurns(_ turns: [Message]) throws {
    let roles = turns.map(\.role).drop { $0 == .system && turns.first?.role == .system }
    guard !roles.isEmpty else { throw GemmaError.tokenizer("the conversation has no user turn; it must begin with one") }
    for (index, role) in roles.enumerated() {
        let expected: Role = index % 2 == 0 ? .user : .assistant
        guard role == expected else {
            throw GemmaError.tokenizer(
                "turn \(index + 1) is by \(role), expected \(expected): after an optional system turn, "
                    + "user and assistant alternate"
            )
        }
    }
    guard roles.count % 2 == 1 else {
        throw GemmaError.tokenizer("the last turn is the assistant's, expected the user's; ask something")
    }
}

/// The text after the last `marker`, compared by scalars as Python does; all of it if there is none.
private func textAfter(_ marker: String, _ text: String) -> String {
    marker.isEmpty ? text : split(text, marker).last ?? text
}

/// The parts of a text between the places where `marker` is, compared by scalars.
private func split(_ text: String, _ marker: String) -> [String] {
    let mark = Array(marker.unicodeScalars)
    let scalars = Array(text.unicodeScalars)
    var parts: [String] = []
    var start = 0
    var at = 0
    while at + mark.count <= scalars.count {
        guard scalars[at..<at + mark.count].elementsEqual(mark) else {
            at += 1
            continue
        }
        parts.append(string(scalars[start..<at]))
        at += mark.count
        start = at
    }
    return parts + [string(scalars[start...])]
}

private func string(_ scalars: ArraySlice<Unicode.Scalar>) -> String {
    var out = String.UnicodeScalarView()
    out.append(contentsOf: scalars)
    return String(out)
}

/// Text without leading and trailing white space, as Python and Jinja define it.
public func strip(_ text: String) -> String {
    let scalars = Array(text.unicodeScalars)
    guard let first = scalars.firstIndex(where: { !isSpace($0) }), let last = scalars.lastIndex(where: { !isSpace($0) })
    else { return "" }
    return string(scalars[first...last])
}

private func isSpace(_ scalar: Unicode.Scalar) -> Bool {
    switch scalar.value {
    case 0x09...0x0D, 0x1C...0x20, 0x85, 0xA0, 0x1680, 0x2000...0x200A, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000:
        return true
    default: return false
    }
}
