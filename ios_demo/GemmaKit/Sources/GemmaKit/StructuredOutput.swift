/// What a model's text is worth as an answer to a schema.
public enum StructuredResult: Equatable {
    case valid(JSON)
    case invalid([Violation])
}

/// The request, with what is expected of the answer.
public func structuredPrompt(_ request: String, _ schema: Schema) -> String {
    "\(request)\n\nAnswer with JSON alone, no other words, that matches this JSON Schema:\n\(schema.description)"
}

/// What to say to the model after an answer that was not right.
public func retryPrompt(_ violations: [Violation]) -> String {
    let told = violations.prefix(mostViolations).map { "- \($0.path): \($0.message)" }.joined(separator: "\n")
    return "That answer does not match the schema:\n\(told)\nAnswer again with the corrected JSON alone."
}

/// Finds the JSON in a model's text, parses it, and validates it.
public func checkStructured(_ text: String, _ schema: Schema) -> StructuredResult {
    guard let value = extractJSON(text) else {
        return .invalid([Violation(path: "$", message: "the answer holds no whole JSON value")])
    }
    let violations = schema.validate(value)
    return violations.isEmpty ? .valid(value) : .invalid(violations)
}

/// The whole text as JSON, or the first object or list in it; nil where there is none.
public func extractJSON(_ text: String) -> JSON? {
    if let whole = try? parseJSON(text) { return whole }
    let bytes = Array(text.utf8)
    let begins = bytes.indices.filter { bytes[$0] == UInt8(ascii: "{") || bytes[$0] == UInt8(ascii: "[") }
    for start in begins.prefix(mostBeginnings) {
        var parser = JSONParser(bytes, at: start)
        if let value = try? parser.value(depth: 0) { return value }
    }
    return nil
}

/// Asks until the answer is right, at most `attempts` times; the last result either way.
public func askStructured(
    _ conversation: Conversation, _ request: String, _ schema: Schema, attempts: Int = 3
) async throws -> StructuredResult {
    var prompt = structuredPrompt(request, schema)
    var result = StructuredResult.invalid([])
    for _ in 0..<attempts {
        let reply = try conversation.send(prompt)
        for try await _ in reply {}
        result = checkStructured(reply.text, schema)
        guard case .invalid(let violations) = result else { return result }
        prompt = retryPrompt(violations)
    }
    return result
}

private let mostViolations = 8
private let mostBeginnings = 64  // each may be read to the end of the text
