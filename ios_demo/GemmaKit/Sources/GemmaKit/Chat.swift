import Foundation

public enum Role: String, Codable, Sendable {
    case system, user, assistant
    case tool  // a turn with what a tool has returned
}

public struct Message: Equatable, Sendable {
    public let role: Role
    public let content: String
    public let toolCalls: [ToolCall]  // of the assistant alone
    public let thought: String  // before the calls; a template may keep it until the user's next turn
    public let name: String?  // of the tool whose result the content is
    public let result: JSON?  // the content as JSON

    public init(
        _ role: Role, _ content: String, toolCalls: [ToolCall] = [], thought: String = "", name: String? = nil,
        result: JSON? = nil
    ) {
        self.role = role
        self.content = content
        self.toolCalls = toolCalls
        self.thought = thought
        self.name = name
        self.result = result
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
    private(set) var tools: ToolFormat?  // nil if this model can't be given tools, or the bundle is older than tools on phones
    private let withThinking: [ChatFormat]  // one or none; an array, because a struct can't contain itself

    /// Throws a bundle error if the bundle has no chat format, because its template can't be expressed as one.
    public init(_ bundle: ModelBundle) throws {
        try self.init(readFile(bundle.path("chat_format")))
    }

    public init(_ file: Data) throws {
        try self.init(JSONFields.parse(file: "chat.json", file))
    }

    init(_ json: JSONFields) throws {
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
        replyWithout = try json.orNil("reply_without")?.pair()
        tools = try json.orNil("tools").map(ToolFormat.init)
        withThinking = try json.orNil("thinking").map { [try ChatFormat($0)] } ?? []
    }

    /// The format that asks the model to think before it answers; nil if the template has none.
    public var thinking: ChatFormat? { withThinking.first }

    /// The format with another way to write tools.
    func with(tools: ToolFormat?) -> ChatFormat {
        var copy = self
        copy.tools = tools
        return copy
    }

    func content(_ turn: Message) -> String {
        let text = turn.role == .assistant ? withoutThoughts(turn.content) : turn.content
        return trims[turn.role == .tool ? .assistant : turn.role] == true ? strip(text) : text
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
        case .assistant, .tool: return assistantToUser
        }
    }
}

/// Token ids of a conversation up to the start of the model's next turn, with bos where the template writes it.
///
/// Message contents, tools, calls and results can't become control tokens. A blank system turn is left out.
public func encodeChat(_ tokenizer: Tokenizer, _ format: ChatFormat, _ messages: [Message], tools: Tools = .none) throws -> [Int]
{
    let turns = messages.filter { $0.role != .system || !strip($0.content).isEmpty }
    try checkTurns(turns)
    let writer = ChatWriter(tokenizer)
    if tools.isEmpty && turns.allSatisfy({ $0.role != .tool && $0.toolCalls.isEmpty }) {
        try writer.chat(format, turns)
        return try writer.finish()
    }
    guard let how = format.tools else { throw noTools }
    switch how {
    case .marks(let marks): try MarkedTools(format, marks, writer).chat(turns, tools)
    case .prompt(let prompt): try writer.chat(format, withoutTools(turns, tools, prompt))
    }
    return try writer.finish()
}

private let noTools = GemmaError.tokenizer(
    "this bundle can't be given tools: phones can't write them as its chat template does, or it is of an earlier "
        + "version; tap No tools in Tools and start a new chat, or export the model again")

/// Throws a tokenizer error if this model can't be given tools, a schema error if its template can't write these.
public func checkTools(_ tokenizer: Tokenizer, _ format: ChatFormat, _ tools: Tools) throws {
    if tools.isEmpty { return }
    guard let how = format.tools else { throw noTools }
    guard case .marks(let marks) = how else { return }
    let writer = MarkedTools(format, marks, ChatWriter(tokenizer))
    for function in tools.functions { try writer.declaration(function) }
}

/// Encodes the template's text and the messages between two control tokens together, as one text.
final class ChatWriter {
    private let tokenizer: Tokenizer
    private var tokens: [Int] = []
    private var text = ""

    init(_ tokenizer: Tokenizer) { self.tokenizer = tokenizer }

    /// Turns without tools.
    func chat(_ format: ChatFormat, _ turns: [Message]) throws {
        try frame(turns[0].role == .system ? format.system : format.first)
        for (index, turn) in turns.enumerated() {
            content(format.content(turn))
            try frame(index == turns.count - 1 ? format.reply : format.after(turn.role))
        }
    }

    func content(_ added: String) { text += added }

    func frame(_ template: String) throws {
        for part in tokenizer.splitControl(template) {
            switch part {
            case .text(let added): text += added
            case .control(let token):
                try flush()
                tokens.append(token)
            }
        }
    }

    func finish() throws -> [Int] {
        try flush()
        return tokens
    }

    private func flush() throws {
        tokens += try tokenizer.encode(text)
        text = ""
    }
}

private func checkTurns(_ turns: [Message]) throws {
    let rest = turns.first?.role == .system ? turns.dropFirst() : turns[...]
    guard let last = rest.last else { throw GemmaError.tokenizer("the conversation has no user turn; it must begin with one") }
    var expected: [Role] = [.user]
    for (index, turn) in rest.enumerated() {
        guard expected.contains(turn.role) else {
            throw GemmaError.tokenizer(
                "turn \(index + 1) is by \(turn.role), expected \(expected[expected.count - 1]): after an optional system turn, "
                    + "user and assistant alternate, and results follow calls"
            )
        }
        switch turn.role {
        case .user: expected = [.assistant]
        case .tool: expected = [.tool, .assistant]
        default: expected = turn.toolCalls.isEmpty ? [.user] : [.tool, .user]
        }
    }
    guard last.role != .assistant else {
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

func string(_ scalars: ArraySlice<Unicode.Scalar>) -> String {
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

func isSpace(_ scalar: Unicode.Scalar) -> Bool {
    switch scalar.value {
    case 0x09...0x0D, 0x1C...0x20, 0x85, 0xA0, 0x1680, 0x2000...0x200A, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000:
        return true
    default: return false
    }
}
