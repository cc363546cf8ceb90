import Foundation

public enum Role: String {
    case system, user, assistant
}

public struct Message: Equatable {
    public let role: Role
    public let content: String

    public init(_ role: Role, _ content: String) {
        self.role = role
        self.content = content
    }
}

/// What stands before, between and after the contents of user and assistant; written by the exporter.
public struct ChatFormat {
    let first: String
    let userToAssistant: String
    let assistantToUser: String
    let reply: String
    let system: String
    let systemToUser: String
    let trims: [Role: Bool]

    /// Throws a bundle error if the bundle's template is none that phones can write.
    public init(_ bundle: ModelBundle) throws {
        try self.init(readFile(bundle.path("chat_format")))
    }

    public init(_ file: Data) throws {
        let json = try JSONFields.parse(file: "chat.json", file)
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
    }

    fileprivate func after(_ role: Role) -> String {
        switch role {
        case .system: return systemToUser
        case .user: return userToAssistant
        case .assistant: return assistantToUser
        }
    }
}

/// Ids of a conversation, up to where the model's next turn begins; bos once, in front.
///
/// Contents are text that can't become a control token. A blank system turn counts as none.
public func encodeChat(
    _ tokenizer: Tokenizer, _ format: ChatFormat, _ messages: [Message], bosToken: Int
) throws -> [Int] {
    let turns = messages.filter { $0.role != .system || !strip($0.content).isEmpty }
    try checkTurns(turns)
    var writer = ChatWriter(tokenizer: tokenizer, bosToken: bosToken)
    try writer.frame(turns[0].role == .system ? format.system : format.first)
    for (place, turn) in turns.enumerated() {
        writer.text += format.trims[turn.role] == true ? strip(turn.content) : turn.content
        try writer.frame(place == turns.count - 1 ? format.reply : format.after(turn.role))
    }
    try writer.flush()
    return writer.tokens
}

/// Between two control tokens the template's words and the user's are encoded as one text.
private struct ChatWriter {
    let tokenizer: Tokenizer
    let bosToken: Int
    var tokens: [Int]
    var text = ""

    init(tokenizer: Tokenizer, bosToken: Int) {
        self.tokenizer = tokenizer
        self.bosToken = bosToken
        tokens = [bosToken]
    }

    mutating func frame(_ words: String) throws {
        for part in tokenizer.splitControl(words) {
            switch part {
            case .text(let words): text += words
            case .control(let token):
                try flush()
                if token != bosToken { tokens.append(token) }
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
    guard !roles.isEmpty else { throw GemmaError.tokenizer("the conversation has no user turn; begin with one") }
    for (place, role) in roles.enumerated() {
        let expected: Role = place % 2 == 0 ? .user : .assistant
        guard role == expected else {
            throw GemmaError.tokenizer(
                "turn \(place + 1) is by \(role), expected \(expected): after an optional system turn, "
                    + "user and assistant alternate"
            )
        }
    }
    guard roles.count % 2 == 1 else {
        throw GemmaError.tokenizer("the last turn is the assistant's; ask something")
    }
}

/// Without the white space around it, by Python's and Jinja's idea of it.
func strip(_ text: String) -> String {
    let scalars = Array(text.unicodeScalars)
    guard let first = scalars.firstIndex(where: { !isSpace($0) }), let last = scalars.lastIndex(where: { !isSpace($0) })
    else { return "" }
    var out = String.UnicodeScalarView()
    out.append(contentsOf: scalars[first...last])
    return String(out)
}

private func isSpace(_ scalar: Unicode.Scalar) -> Bool {
    switch scalar.value {
    case 0x09...0x0D, 0x1C...0x20, 0x85, 0xA0, 0x1680, 0x2000...0x200A, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000:
        return true
    default: return false
    }
}
