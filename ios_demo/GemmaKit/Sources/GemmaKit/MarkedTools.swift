/// Writes tools, calls and results in the syntax of Gemma 4's chat template. The exporter has compared the same writer in Python
/// with the template. Names and values stay text, whatever control token they name.
struct MarkedTools {
    private let format: ChatFormat
    private let marks: ToolMarks
    private let writer: ChatWriter

    init(_ format: ChatFormat, _ marks: ToolMarks, _ writer: ChatWriter) {
        self.format = format
        self.marks = marks
        self.writer = writer
    }

    func chat(_ turns: [Message], _ tools: Tools) throws {
        let system = turns.first.flatMap { $0.role == .system ? $0 : nil }
        let hasSystem = system != nil || !tools.isEmpty
        try writer.frame(hasSystem ? format.system : format.first)
        if let system { writer.content(format.content(system)) }
        for function in tools.functions { try declaration(function) }
        if hasSystem { try writer.frame(format.systemToUser) }
        let steps = steps(system == nil ? turns[...] : turns.dropFirst())
        let asked = steps.lastIndex { $0.turn.role == .user } ?? -1
        for (index, step) in steps.enumerated() {
            try write(step, isNew: index > asked)
            try writer.frame(after(step, index + 1 < steps.count ? steps[index + 1] : nil))
        }
    }

    func declaration(_ function: JSONObject) throws {
        try wrapped(marks.declaration) {
            writer.content("\(nameOf(function)){description:")
            try quoted(function["description"].map { try text(of: $0, "description", function) } ?? "")
            if let value = function["parameters"], value.isTrue {
                try parameters(object(value, "parameters", function), function)
            }
            if let value = function["response"] { try response(fields(of: value), function) }
            writer.content("}")
        }
    }

    private func steps(_ turns: ArraySlice<Message>) -> [Step] {
        var steps: [Step] = []
        for turn in turns {
            if let last = steps.last, turn.role == .tool {
                steps[steps.count - 1].results = last.results + [turn]
            } else if let last = steps.last, !last.results.isEmpty, turn.role == .assistant, turn.toolCalls.isEmpty {
                steps[steps.count - 1].content = strip("\(last.content)\n\(turn.content)")
            } else {
                steps.append(Step(turn: turn, content: turn.content))
            }
        }
        return steps
    }

    private func write(_ step: Step, isNew: Bool) throws {
        let turn = step.turn
        if isNew && !turn.thought.isEmpty && !turn.toolCalls.isEmpty {
            try wrapped(marks.thought) { writer.content(turn.thought) }
        }
        for call in turn.toolCalls {
            try wrapped(marks.call) {
                writer.content(call.name)
                try value(.object(call.arguments), quotedKeys: false)
            }
        }
        for result in step.results {
            try wrapped(marks.response) {
                writer.content(result.name ?? "")
                var written = result.result ?? .string(result.content)
                if case .object = written {} else { written = .object(JSONObject([("value", written)])) }
                try value(written, quotedKeys: false)
            }
        }
        writer.content(said(step))
    }

    private func said(_ step: Step) -> String { format.content(Message(step.turn.role, step.content)) }

    /// The text between a step and the next one, or the reply.
    private func after(_ step: Step, _ next: Step?) -> String {
        if step.turn.role == .user { return next == nil ? format.reply : format.userToAssistant }
        guard let next else { return said(step).isEmpty ? marks.reply : marks.replyAfterText }
        if next.turn.role == .assistant { return "" }
        return !step.turn.toolCalls.isEmpty && step.results.isEmpty ? marks.unanswered : format.assistantToUser
    }

    /// Without a type the brace stays open, as in the template.
    private func parameters(_ schema: JSONObject, _ function: JSONObject) throws {
        writer.content(",parameters:{")
        if let value = schema["properties"], value.isTrue {
            writer.content("properties:{")
            try properties(object(value, "properties", function), function)
            writer.content("},")
        }
        if let value = schema["required"], value.isTrue {
            try required(value, function)
            writer.content(",")
        }
        if let value = schema["type"], value.isTrue {
            writer.content("type:")
            try quoted(text(of: value, "type", function).uppercased())
            writer.content("}")
        }
    }

    /// For a type other than an object's the brace stays open, as in the template.
    private func response(_ fields: JSONObject, _ function: JSONObject) throws {
        writer.content(",response:{")
        if let value = fields["description"], value.isTrue {
            writer.content("description:")
            try quoted(text(of: value, "description", function))
            writer.content(",")
        }
        if case .string(let type)? = fields["type"], type.uppercased() == "OBJECT" {
            writer.content("type:")
            try quoted("OBJECT")
            writer.content("}")
        }
    }

    private func properties(_ properties: JSONObject, _ function: JSONObject) throws {
        try listed(sorted(properties)) { name, schema in
            writer.content("\(name):{")
            try property(fields(of: schema), function)
            writer.content("}")
        }
    }

    private func property(_ fields: JSONObject, _ function: JSONObject) throws {
        let type = try fields["type"].map { try text(of: $0, "type", function).uppercased() } ?? ""
        if let value = fields["description"], value.isTrue {
            writer.content("description:")
            try quoted(text(of: value, "description", function))
            writer.content(",")
        }
        if let choices = fields["enum"], choices.isTrue, type == "STRING" {
            writer.content("enum:")
            try value(choices, quotedKeys: true)
            writer.content(",")
        }
        if let value = fields["items"], value.isTrue, type == "ARRAY", case .object(let inner) = value {
            try items(inner, function)
        }
        if fields["nullable"]?.isTrue == true { writer.content("nullable:true,") }
        if type == "OBJECT" { try objectProperties(fields, function) }
        writer.content("type:")
        try quoted(type)
    }

    private func objectProperties(_ fields: JSONObject, _ function: JSONObject) throws {
        writer.content("properties:{")
        if case .object(let inner)? = fields["properties"] {
            try properties(inner, function)
        } else {
            try properties(JSONObject(fields.fields.filter { !standard.contains($0.name) }), function)
        }
        writer.content("},")
        if let value = fields["required"], value.isTrue {
            try required(value, function)
            writer.content(",")
        }
    }

    private func items(_ items: JSONObject, _ function: JSONObject) throws {
        writer.content("items:{")
        try listed(sorted(items).filter { $0.value != .null }) { name, item in
            switch name {
            case "properties":
                writer.content("properties:{")
                try properties(fields(of: item), function)
                writer.content("}")
            case "required": try required(item, function)
            case "type":
                writer.content("type:")
                try quoted(text(of: item, "type", function).uppercased())
            default:
                writer.content("\(name):")
                try value(item, quotedKeys: true)
            }
        }
        writer.content("},")
    }

    private func required(_ names: JSON, _ function: JSONObject) throws {
        guard case .array(let items) = names else { throw unlike(names, "required", "a list of names", function) }
        writer.content("required:[")
        try listed(items) { try quoted(text(of: $0, "required", function)) }
        writer.content("]")
    }

    private func value(_ value: JSON, quotedKeys: Bool) throws {
        switch value {
        case .object(let object):
            writer.content("{")
            try listed(sorted(object)) { name, item in
                if quotedKeys { try quoted(name) } else { writer.content(name) }
                writer.content(":")
                try self.value(item, quotedKeys: quotedKeys)
            }
            writer.content("}")
        case .array(let items):
            writer.content("[")
            try listed(items) { try self.value($0, quotedKeys: quotedKeys) }
            writer.content("]")
        case .string(let text): try quoted(text)
        default: writer.content(value.pythonJSON())
        }
    }

    private func listed<T>(_ items: [T], _ write: (T) throws -> Void) throws {
        for (index, item) in items.enumerated() {
            if index > 0 { writer.content(",") }
            try write(item)
        }
    }

    private func quoted(_ text: String) throws {
        try writer.frame(marks.quote)
        writer.content(text)
        try writer.frame(marks.quote)
    }

    private func wrapped(_ marks: (opens: String, closes: String), _ write: () throws -> Void) throws {
        try writer.frame(marks.opens)
        try write()
        try writer.frame(marks.closes)
    }
}

/// What the model does in one step: its thought, calls, their results, and what it says.
private struct Step {
    let turn: Message
    var results: [Message] = []
    var content: String
}

private let standard: Set<String> = ["description", "type", "properties", "required", "nullable"]

/// A schema that is no object, such as true, has nothing that is written.
private func fields(of schema: JSON) -> JSONObject {
    if case .object(let object) = schema { object } else { JSONObject([]) }
}

private func object(_ value: JSON, _ field: String, _ function: JSONObject) throws -> JSONObject {
    guard case .object(let object) = value else { throw unlike(value, field, "an object", function) }
    return object
}

private func text(of value: JSON, _ field: String, _ function: JSONObject) throws -> String {
    guard case .string(let text) = value else { throw unlike(value, field, "a text", function) }
    return text
}

private func unlike(_ value: JSON, _ field: String, _ expected: String, _ function: JSONObject) -> GemmaError {
    .schema(
        "the tool \(nameOf(function).prefix(40)) has \"\(field)\": \(value.write().prefix(40)), but this model's template needs "
            + "\(expected) there; change it in Tools")
}

extension JSON {
    /// Whether a template takes it for true.
    fileprivate var isTrue: Bool {
        switch self {
        case .object(let object): !object.fields.isEmpty
        case .array(let items): !items.isEmpty
        case .string(let text): !text.isEmpty
        case .number(let value, _): value != 0
        case .boolean(let value): value
        case .null: false
        }
    }
}

/// Fields by name without regard to case, as Jinja's `dictsort` has them.
private func sorted(_ object: JSONObject) -> [(name: String, value: JSON)] {
    let keyed = object.fields.enumerated().map { (key: Array($1.name.lowercased().unicodeScalars), place: $0, field: $1) }
    return keyed.sorted { one, other in
        one.key == other.key ? one.place < other.place : one.key.lexicographicallyPrecedes(other.key)
    }.map(\.field)
}
