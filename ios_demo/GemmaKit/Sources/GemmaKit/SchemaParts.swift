/// A schema's keywords, parsed and checked.
struct SchemaParts: Sendable {
    let types: [String]?
    let choices: [[JSON]]  // of enum and of const; a value must be in each
    let anyOf: [Schema]?
    let properties: [[UInt8]: Schema]  // by the name's UTF-8
    let required: [String]
    let closed: Bool  // additionalProperties is false
    let items: Schema?
    let numbers: [String: Double]  // of the limits, by keyword

    init(_ source: JSON) throws {
        guard case .object(let keywords) = source else {
            throw GemmaError.schema("the schema is \(source.write().prefix(40)), expected an object")
        }
        if let unknown = keywords.fields.first(where: { !supported.contains($0.name) }) {
            throw GemmaError.schema(
                "the schema's keyword \"\(unknown.name)\" is not supported; use only: "
                    + (limits + kinds).joined(separator: ", ")
            )
        }
        types = try keywords["type"].map(readTypes)
        choices = try [keywords["enum"].map { try list("enum", $0) }, keywords["const"].map { [$0] }].compactMap { $0 }
        anyOf = try keywords["anyOf"].map { try list("anyOf", $0).map { try Schema($0) } }
        var schemas: [[UInt8]: Schema] = [:]
        for field in try keywords["properties"].map({ try fields("properties", $0) }) ?? [] {
            schemas[Array(field.name.utf8)] = try Schema(field.value)
        }
        properties = schemas
        required = try keywords["required"].map { try list("required", $0).map { try text("required", $0) } } ?? []
        closed = try keywords["additionalProperties"].map(readClosed) ?? false
        items = try keywords["items"].map { try Schema($0) }
        var sizes: [String: Double] = [:]
        for (name, value) in keywords.fields where limits.contains(name) { sizes[name] = try readLimit(name, value) }
        numbers = sizes
    }
}

private let types = ["object", "array", "string", "number", "integer", "boolean", "null"]
private let counts = ["minLength", "maxLength", "minItems", "maxItems"]
private let limits = counts + ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]
private let annotations = ["title", "description", "$schema", "default", "examples"]  // don't restrict values
private let kinds = ["type", "enum", "const", "anyOf", "properties", "required", "additionalProperties", "items"]
private let supported = Set(limits + annotations + kinds)

private func wrong(_ name: String, _ value: JSON, _ expected: String) -> GemmaError {
    .schema("the schema's \"\(name)\" is \(value.write().prefix(40)), expected \(expected)")
}

private func list(_ name: String, _ value: JSON) throws -> [JSON] {
    guard case .array(let items) = value else { throw wrong(name, value, "a list") }
    return items
}

private func text(_ name: String, _ value: JSON) throws -> String {
    guard case .string(let text) = value else { throw wrong(name, value, "a string") }
    return text
}

private func fields(_ name: String, _ value: JSON) throws -> [(name: String, value: JSON)] {
    guard case .object(let object) = value else { throw wrong(name, value, "an object") }
    return object.fields
}

private func readTypes(_ value: JSON) throws -> [String] {
    var names = [value]
    if case .array(let several) = value { names = several }
    return try names.map { name in
        let type = try text("type", name)
        guard types.contains(type) else { throw wrong("type", name, types.joined(separator: " or ")) }
        return type
    }
}

private func readClosed(_ value: JSON) throws -> Bool {
    guard case .boolean(let open) = value else { throw wrong("additionalProperties", value, "true or false") }
    return !open
}

private func readLimit(_ name: String, _ value: JSON) throws -> Double {
    guard case .number(let number, _) = value else { throw wrong(name, value, "a number") }
    guard !counts.contains(name) || (number >= 0 && number == number.rounded()) else {
        throw wrong(name, value, "a whole number of at least 0")
    }
    return number
}
