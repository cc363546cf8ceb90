import Foundation

/// A conversation as it is saved: without the system turn, which is a setting, and without thoughts, but those before calls,
/// which the model sees until the user's next turn.
public struct SavedChat: Codable, Equatable, Identifiable, Sendable {
    public let id: UUID
    public var settings: ChatSettings?  // nil: saved by an earlier version, which had the same ones for all chats
    public var turns: [Message]  // also those that the model has forgotten
    public var forgotten: Int  // how many of the first turns the model no longer sees
    public var changed: Date

    public init(
        id: UUID = UUID(), settings: ChatSettings? = nil, turns: [Message] = [], forgotten: Int = 0, changed: Date = Date()
    ) {
        self.id = id
        self.settings = settings
        self.turns = turns
        self.forgotten = forgotten
        self.changed = changed
    }

    /// Chats saved by an earlier version don't say what was forgotten: it is not in them. Nor do they have settings.
    public init(from decoder: Decoder) throws {
        let fields = try decoder.container(keyedBy: CodingKeys.self)
        id = try fields.decode(UUID.self, forKey: .id)
        settings = try fields.decodeIfPresent(ChatSettings.self, forKey: .settings)
        turns = try fields.decode([Message].self, forKey: .turns)
        forgotten = try fields.decodeIfPresent(Int.self, forKey: .forgotten) ?? 0
        changed = try fields.decode(Date.self, forKey: .changed)
        guard (0...turns.count).contains(forgotten) else {
            throw GemmaError.session("\(forgotten) turns are forgotten, of \(turns.count)")
        }
    }

    /// The beginning of the first question.
    public var title: String { String((turns.first?.content ?? "").prefix(60)) }
}

/// Values of calls and results are JSON in a string, which keeps their numbers as they were written.
extension Message: Codable {
    private enum Names: String, CodingKey { case role, content, calls, thought, name, result }

    public init(from decoder: Decoder) throws {
        let fields = try decoder.container(keyedBy: Names.self)
        let result = try fields.decodeIfPresent(String.self, forKey: .result).map(parseJSON)
        self.init(
            try fields.decode(Role.self, forKey: .role), try fields.decode(String.self, forKey: .content),
            toolCalls: try fields.decodeIfPresent([ToolCall].self, forKey: .calls) ?? [],
            thought: try fields.decodeIfPresent(String.self, forKey: .thought) ?? "",
            name: try fields.decodeIfPresent(String.self, forKey: .name), result: result)
        guard role != .tool || name != nil && result != nil else {
            throw GemmaError.session("a tool's turn has no name or no result")
        }
    }

    public func encode(to encoder: Encoder) throws {
        var fields = encoder.container(keyedBy: Names.self)
        try fields.encode(role, forKey: .role)
        try fields.encode(content, forKey: .content)
        if !toolCalls.isEmpty { try fields.encode(toolCalls, forKey: .calls) }
        if !thought.isEmpty { try fields.encode(thought, forKey: .thought) }
        try fields.encodeIfPresent(name, forKey: .name)
        try fields.encodeIfPresent(result?.pythonJSON(), forKey: .result)
    }
}

extension ToolCall: Codable {
    private enum Names: String, CodingKey { case name, arguments }

    public init(from decoder: Decoder) throws {
        let fields = try decoder.container(keyedBy: Names.self)
        guard case .object(let arguments) = try parseJSON(fields.decode(String.self, forKey: .arguments)) else {
            throw GemmaError.session("the arguments of a call are no object")
        }
        self.init(name: try fields.decode(String.self, forKey: .name), arguments: arguments)
    }

    public func encode(to encoder: Encoder) throws {
        var fields = encoder.container(keyedBy: Names.self)
        try fields.encode(name, forKey: .name)
        try fields.encode(JSON.object(arguments).pythonJSON(), forKey: .arguments)
    }
}

/// What is open, so that the app can go on with it.
public struct AppState: Codable, Equatable, Sendable {
    public var bundle: String?  // name of its folder
    public var chat: UUID?
    public var settings = ChatSettings()  // of the chat that is open, also if it has no turns and is not saved
    public var computeUnits = ComputeUnits.automatic  // for all chats, from the next time that a bundle is loaded

    public init() {}

    /// An earlier version kept the compute units in the settings; other versions may know other units. Settings that can't be
    /// read are replaced, and cost nothing else.
    public init(from decoder: Decoder) throws {
        let fields = try decoder.container(keyedBy: CodingKeys.self)
        bundle = try fields.decodeIfPresent(String.self, forKey: .bundle)
        chat = try fields.decodeIfPresent(UUID.self, forKey: .chat)
        settings = (try? fields.decode(ChatSettings.self, forKey: .settings)) ?? ChatSettings()
        let old = try? fields.nestedContainer(keyedBy: CodingKeys.self, forKey: .settings)
        computeUnits = [fields, old].compactMap { try? $0?.decode(ComputeUnits.self, forKey: .computeUnits) }.first ?? .automatic
    }
}

/// Saves chats and the app's state, one file each, in a folder.
public struct ChatStore: Sendable {
    private let chats: URL
    private let state: URL

    public init(_ folder: URL) {
        chats = folder.appendingPathComponent("chats")
        state = folder.appendingPathComponent("state.json")
    }

    /// All chats, the last changed first. A file that can't be read is left out, and stays.
    public func load() -> [SavedChat] {
        let files = try? FileManager.default.contentsOfDirectory(at: chats, includingPropertiesForKeys: nil)
        return (files ?? []).compactMap { try? read(SavedChat.self, $0) }.sorted { $0.changed > $1.changed }
    }

    public func save(_ chat: SavedChat) throws { try write(chat, place(chat.id)) }

    public func delete(_ id: UUID) throws { try FileManager.default.removeItem(at: place(id)) }

    /// The app's state; a new one if none can be read.
    public func loadState() -> AppState { (try? read(AppState.self, state)) ?? AppState() }

    public func save(_ new: AppState) throws { try write(new, state) }

    private func place(_ id: UUID) -> URL { chats.appendingPathComponent(id.uuidString + ".json") }

    private func read<T: Decodable>(_ type: T.Type, _ path: URL) throws -> T {
        let file = try Data(contentsOf: path)
        _ = try JSONFields.parse(file: path.lastPathComponent, file)  // Foundation's decoder ends the process on some damage
        return try JSONDecoder().decode(type, from: file)
    }

    private func write<T: Encodable>(_ value: T, _ path: URL) throws {
        try FileManager.default.createDirectory(at: path.deletingLastPathComponent(), withIntermediateDirectories: true)
        try JSONEncoder().encode(value).write(to: path, options: .atomic)
    }
}
