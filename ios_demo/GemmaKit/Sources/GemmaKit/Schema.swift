/// A place in a value, such as `$.age`, and what is wrong there.
public struct Violation: Equatable {
    public let path: String
    public let message: String
}

/// A JSON Schema of a few keywords: type, enum, const, anyOf, properties, required, additionalProperties,
/// items, and the limits of numbers, texts and lists. Others are refused: to ignore one would be to lie.
public final class Schema {
    private let source: JSON
    private let parts: SchemaParts

    /// Throws a schema error where the value is no such schema.
    public init(_ source: JSON) throws {
        self.source = source
        parts = try SchemaParts(source)
    }

    /// Throws a JSON error where the text is not JSON.
    public convenience init(_ text: String) throws {
        try self.init(parseJSON(text))
    }

    public var description: String { source.write() }

    /// All that is wrong with a value; empty where it is right.
    public func validate(_ value: JSON) -> [Violation] { check("$", value) }

    private func check(_ path: String, _ value: JSON) -> [Violation] {
        let problems = typeProblem(value).map { [$0] } ?? sizeProblems(value)
        return (problems + choiceProblems(path, value)).map { Violation(path: path, message: $0) } + childProblems(path, value)
    }

    private func typeProblem(_ value: JSON) -> String? {
        guard let types = parts.types, !types.contains(where: { hasType(value, $0) }) else { return nil }
        return "expected \(types.joined(separator: " or "))"
    }

    private func sizeProblems(_ value: JSON) -> [String] {
        switch value {
        case .number(let number): return limits(number, "", "minimum", "maximum") + exclusive(number)
        case .string(let text):
            return limits(Double(text.unicodeScalars.count), " characters", "minLength", "maxLength")
        case .array(let items): return limits(Double(items.count), " items", "minItems", "maxItems")
        case .object(let object): return parts.required.filter { object[$0] == nil }.map { "\"\($0)\" is missing" }
        default: return []
        }
    }

    private func limits(_ size: Double, _ unit: String, _ least: String, _ most: String) -> [String] {
        var found: [String] = []
        if let limit = parts.numbers[least], size < limit { found.append("expected at least \(written(limit))\(unit)") }
        if let limit = parts.numbers[most], size > limit { found.append("expected at most \(written(limit))\(unit)") }
        return found
    }

    private func exclusive(_ value: Double) -> [String] {
        var found: [String] = []
        if let limit = parts.numbers["exclusiveMinimum"], value <= limit { found.append("expected more than \(written(limit))") }
        if let limit = parts.numbers["exclusiveMaximum"], value >= limit { found.append("expected less than \(written(limit))") }
        return found
    }

    private func choiceProblems(_ path: String, _ value: JSON) -> [String] {
        var found: [String] = []
        if let choices = parts.choices, !choices.contains(value) {
            found.append("expected one of \(JSON.array(choices).write())")
        }
        if let anyOf = parts.anyOf, anyOf.allSatisfy({ !$0.check(path, value).isEmpty }) {
            found.append("expected one of: \(anyOf.map(\.description).joined(separator: ", "))")
        }
        return found
    }

    private func childProblems(_ path: String, _ value: JSON) -> [Violation] {
        switch value {
        case .object(let object):
            return object.fields.flatMap { name, child -> [Violation] in
                if let schema = parts.properties[Array(name.utf8)] { return schema.check("\(path).\(name)", child) }
                return parts.closed ? [Violation(path: "\(path).\(name)", message: "is not expected here")] : []
            }
        case .array(let items):
            guard let schema = parts.items else { return [] }
            return items.enumerated().flatMap { schema.check("\(path)[\($0)]", $1) }
        default: return []
        }
    }
}

private func hasType(_ value: JSON, _ type: String) -> Bool {
    switch value {
    case .object: return type == "object"
    case .array: return type == "array"
    case .string: return type == "string"
    case .number(let number): return type == "number" || (type == "integer" && number == number.rounded())
    case .boolean: return type == "boolean"
    case .null: return type == "null"
    }
}

private func written(_ number: Double) -> String { JSON.number(number).write() }
