/// A schema's keywords, read and checked.
struct SchemaParts {
    let types: [String]?
    let choices: [JSON]?  // of enum or const
    let anyOf: [Schema]?
    let properties: [[UInt8]: Schema]  // by the name's UTF-8
    let required: [String]
    let closed: Bool  // additionalProperties is false
    let items: Schema?
    let numbers: [String: Double]  // limits by keyword

    init(_ source: JSON) throws {
        guard case .object(let keywords) = source else {
            throw GemmaError.schema("the schema is \(source.write().prefix(40)), expected an object")
        }
        if let unknown = keywords.fields.first(where: { !known.contains($0.name) }) {
            throw GemmaError.schema(
                "the schema's keyword \"\(unknown.name)\" is not understood here; known are: "
                    + (limits + kinds).joined(separator: ", ")
            )
        }
        types = try keywords["type"].map(readTypes)
        choices = try keywords["const"].map { [$0] } ?? keywords["enum"].map { try list("enum", $0) }
        anyOf = try keywords["anyOf"].map { try list("anyOf", $0).map { try Schema($0) } }
        var found: [[UInt8]: Schema] = [:]
        for field in try keywords["properties"].map({ try fields("properties", $0) }) ?? [] {
            found[Array(field.name.utf8)] = try Schema(field.value)
        }
        properties = found
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
private let words = ["title", "description", "$schema", "default", "examples"]  // say nothing of a value
private let kinds = ["type", "enum", "const", "anyOf", "properties", "required", "additionalProperties", "items"]
private let known = Set(limits + words + kinds)

private func wrong(_ name: String, _ found: JSON, _ expected: String) -> GemmaError {
    .schema("the schema's \"\(name)\" is \(found.write().prefix(40)), expected \(expected)")
}

private func list(_ name: String, _ value: JSON) throws -> [JSON] {
    guard case .array(let items) = value else { throw wrong(name, value, "a list") }
    return items
}

private func text(_ name: String, _ value: JSON) throws -> String {
    guard case .string(let found) = value else { throw wrong(name, value, "a text") }
    return found
}

private func fields(_ name: String, _ value: JSON) throws -> [(name: String, value: JSON)] {
    guard case .object(let object) = value else { throw wrong(name, value, "an object") }
    return object.fields
}

private func readTypes(_ value: JSON) throws -> [String] {
    var names: [JSON] = [value]
    if case .array(let several) = value { names = several }
    return try names.map { name in
        let found = try text("type", name)
        guard types.contains(found) else { throw wrong("type", name, types.joined(separator: " or ")) }
        return found
    }
}

private func readClosed(_ value: JSON) throws -> Bool {
    guard case .boolean(let open) = value else { throw wrong("additionalProperties", value, "true or false") }
    return !open
}

private func readLimit(_ name: String, _ value: JSON) throws -> Double {
    guard case .number(let number) = value else { throw wrong(name, value, "a number") }
    if counts.contains(name), number < 0 || number != number.rounded() { throw wrong(name, value, "a count") }
    return number
}
