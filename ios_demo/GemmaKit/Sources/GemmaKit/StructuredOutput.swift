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
    "That answer does not match the schema:\n\(told(violations))\nAnswer again with the corrected JSON alone."
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

/// What came of asking, and how often was asked.
public struct StructuredAnswer: Equatable {
    public let result: StructuredResult
    public let attempts: Int

    /// The outcome, for whoever asked.
    public var inWords: String {
        let tries = attempts == 1 ? "first try" : "\(attempts) tries"
        switch result {
        case .valid(let value): return "The answer matches the schema (\(tries)): \(value.write())"
        case .invalid(let violations): return "The answer does not match the schema (\(tries)):\n\(told(violations))"
        }
    }
}

/// Asks until the answer is right, at most `attempts` times; the last result either way.
///
/// An answer ends after `maxNewTokens`: a model that never ends one would fill the context at once.
public func askStructured(
    _ conversation: Conversation, _ request: String, _ schema: Schema, attempts: Int = 3, maxNewTokens: Int = 512,
    onReply: (Reply) async throws -> Void = { reply in for try await _ in reply {} }
) async throws -> StructuredAnswer {
    var prompt = structuredPrompt(request, schema)
    var answer = StructuredAnswer(result: .invalid([]), attempts: 0)
    while answer.attempts < attempts {
        let reply = try conversation.send(prompt, maxNewTokens: maxNewTokens)
        try await onReply(reply)
        answer = StructuredAnswer(result: checkStructured(reply.text, schema), attempts: answer.attempts + 1)
        guard case .invalid(let violations) = answer.result else { return answer }
        prompt = retryPrompt(violations)
    }
    return answer
}

/// A schema to begin with.
public let exampleSchema = """
    {
      "type": "object",
      "properties": {
        "answer": {"type": "string"},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1}
      },
      "required": ["answer", "confidence"],
      "additionalProperties": false
    }
    """

private let mostViolations = 8
private let mostBeginnings = 64  // each may be read to the end of the text

private func told(_ violations: [Violation]) -> String {
    violations.prefix(mostViolations).map { "- \($0.path): \($0.message)" }.joined(separator: "\n")
}
