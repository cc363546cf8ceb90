/// A call that a reply asks for. Nothing is run by itself.
public struct ToolCall: Equatable, Sendable {
    public let name: String
    public let arguments: JSONObject

    public init(name: String, arguments: JSONObject) {
        self.name = name
        self.arguments = arguments
    }

    /// The call on one line, for a screen: `get_weather(city: "Rome")`.
    public var summary: String {
        let written = arguments.fields.map { "\($0.name): \($0.value.pythonJSON())" }
        return "\(name)(\(written.joined(separator: ", ")))"
    }
}

/// Functions that the model may call, as JSON schemas of the form `{"type": "function", "function": {"name": …}}`.
public struct Tools: Equatable, Sendable {
    public static let none = Tools(schemas: [])

    public let schemas: [JSONObject]

    private init(schemas: [JSONObject]) { self.schemas = schemas }

    /// Reads a JSON list of schemas, whole or only what is in `function`; a blank text has none. Throws a schema error.
    public init(_ text: String) throws {
        if strip(text).isEmpty {
            self = .none
            return
        }
        let value: JSON
        do {
            value = try parseJSON(text)
        } catch let error as GemmaError {
            throw GemmaError.schema("the tools are \(error.message); give a JSON list of schemas")
        }
        guard case .array(let items) = value else {
            throw GemmaError.schema(
                "the tools are \(value.write().prefix(40)), expected a list of tools, each a JSON schema with a name")
        }
        schemas = try items.enumerated().map { try readSchema($1, at: $0) }
    }

    public var isEmpty: Bool { schemas.isEmpty }

    public var names: Set<String> { Set(functions.map(nameOf)) }

    var functions: [JSONObject] {
        schemas.compactMap { schema in
            guard case .object(let function)? = schema["function"] else { return nil }
            return function
        }
    }
}

private func readSchema(_ item: JSON, at index: Int) throws -> JSONObject {
    let nameless = GemmaError.schema("tool \(index + 1) has no name; expected a JSON schema")
    guard case .object(let given) = item else { throw nameless }
    let whole = given["function"] == nil ? JSONObject([("type", .string("function")), ("function", item)]) : given
    guard case .object(let function)? = whole["function"], case .string? = function["name"] else { throw nameless }
    return whole
}

/// The name of a tool, which `Tools` has checked.
func nameOf(_ function: JSONObject) -> String {
    guard case .string(let name)? = function["name"] else { return "" }
    return name
}

/// The calls of the last turn, which wait for their results.
public func openCalls(_ turns: [Message]) -> [ToolCall] { turns.last?.toolCalls ?? [] }

/// What a user gave as the result of a call: JSON, or else a text.
public func parseResult(_ text: String) -> JSON { (try? parseJSON(text)) ?? .string(text) }

/// The turn with the result of a call.
func resultTurn(_ call: ToolCall, _ result: JSON) -> Message {
    var content = result.pythonJSON()
    if case .string(let text) = result { content = text }
    return Message(.tool, content, name: call.name, result: result)
}
