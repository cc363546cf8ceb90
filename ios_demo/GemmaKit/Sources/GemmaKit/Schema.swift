/// A path in a value, such as `$.age`, and what is wrong there.
public struct Violation: Equatable, Sendable {
    public let path: String
    public let message: String
}

/// A JSON Schema with these keywords: type, enum, const, anyOf, properties, required, additionalProperties,
/// items, and the limits of numbers, strings and arrays. Other keywords are refused, since ignoring one would
/// accept wrong values.
public final class Schema: Equatable, Sendable {
    private let source: JSON
    private let parts: SchemaParts

    /// Throws a schema error if the value is not a supported schema.
    public init(_ source: JSON) throws {
        self.source = source
        parts = try SchemaParts(source)
    }

    /// Throws a JSON error if the text is not JSON, a schema error if it is not a supported schema.
    public convenience init(_ text: String) throws {
        try self.init(parseJSON(text))
    }

    public var description: String { source.write() }

    public static func == (left: Schema, right: Schema) -> Bool { left.source == right.source }

    /// Everything that is wrong with a value; empty if it is valid.
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
        case .number(let value, _): return limits(value, "", "minimum", "maximum") + exclusive(value)
        case .string(let text):
            return limits(Double(text.unicodeScalars.count), " characters", "minLength", "maxLength")
        case .array(let items): return limits(Double(items.count), " items", "minItems", "maxItems")
        case .object(let object): return parts.required.filter { object[$0] == nil }.map { "\"\($0)\" is missing" }
        default: return []
        }
    }

    private func limits(_ size: Double, _ unit: String, _ minimum: String, _ maximum: String) -> [String] {
        var problems: [String] = []
        if let limit = parts.numbers[minimum], size < limit { problems.append("expected at least \(number(limit))\(unit)") }
        if let limit = parts.numbers[maximum], size > limit { problems.append("expected at most \(number(limit))\(unit)") }
        return problems
    }

    private func exclusive(_ value: Double) -> [String] {
        let (minimum, maximum) = (parts.numbers["exclusiveMinimum"], parts.numbers["exclusiveMaximum"])
        var problems: [String] = []
        if let minimum, value <= minimum { problems.append("expected more than \(number(minimum))") }
        if let maximum, value >= maximum { problems.append("expected less than \(number(maximum))") }
        return problems
    }

    private func choiceProblems(_ path: String, _ value: JSON) -> [String] {
        var problems = parts.choices.filter { !$0.contains(value) }.map { "expected one of \(JSON.array($0).write())" }
        if let anyOf = parts.anyOf, anyOf.allSatisfy({ !$0.check(path, value).isEmpty }) {
            problems.append("expected one of: \(anyOf.map(\.description).joined(separator: ", "))")
        }
        return problems
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
    case .number(let number, _): return type == "number" || (type == "integer" && number == number.rounded())
    case .boolean: return type == "boolean"
    case .null: return type == "null"
    }
}

private func number(_ value: Double) -> String { JSON.number(value).write() }
