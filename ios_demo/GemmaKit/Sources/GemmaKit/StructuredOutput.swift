/// A model's answer, checked against a schema.
public enum StructuredResult: Equatable, Sendable {
    case valid(JSON)
    case invalid([Violation])
}

/// The request and the format that its answer must have.
public func structuredPrompt(_ request: String, _ schema: Schema) -> String {
    "\(request)\n\nAnswer with JSON alone, no other words, that matches this JSON Schema:\n\(schema.description)"
}

/// A message without what `structuredPrompt` has added to it for this schema.
public func request(in message: String, _ schema: Schema?) -> String {
    guard let schema else { return message }
    let added = structuredPrompt("", schema).utf8
    let kept = message.utf8.count - added.count
    guard kept >= 0, message.utf8.dropFirst(kept).elementsEqual(added) else { return message }
    return String(decoding: message.utf8.prefix(kept), as: UTF8.self)
}

/// The place of the last question that the user asked; nil if there is none. A request for a corrected answer is none.
public func lastQuestion(_ turns: [Message]) -> Int? {
    turns.lastIndex { $0.role == .user && !$0.content.hasPrefix(retry) }
}

/// The message to the model after an invalid answer.
public func retryPrompt(_ violations: [Violation]) -> String {
    "\(retry)\(bulleted(violations))\nAnswer again with the corrected JSON alone."
}

/// Finds, parses and validates the JSON in a model's text.
public func checkStructured(_ text: String, _ schema: Schema) -> StructuredResult {
    guard let value = extractJSON(text) else {
        return .invalid([Violation(path: "$", message: "the answer has no complete JSON value")])
    }
    let violations = schema.validate(value)
    return violations.isEmpty ? .valid(value) : .invalid(violations)
}

/// The whole text as JSON, or the first object or array in it; nil if there is none.
public func extractJSON(_ text: String) -> JSON? {
    if let whole = try? parseJSON(text) { return whole }
    let bytes = Array(text.utf8)
    let starts = bytes.indices.filter { bytes[$0] == UInt8(ascii: "{") || bytes[$0] == UInt8(ascii: "[") }
    for start in starts.prefix(maxStarts) {
        var parser = JSONParser(bytes, at: start)
        if let value = try? parser.value(depth: 0) { return value }
    }
    return nil
}

/// The last result and the number of attempts it took.
public struct StructuredAnswer: Equatable, Sendable {
    public let result: StructuredResult
    public let attempts: Int

    /// The outcome as a message for the user.
    public var summary: String {
        let tries = attempts == 1 ? "first try" : "\(attempts) tries"
        switch result {
        case .valid(let value): return "The answer matches the schema (\(tries)): \(value.write())"
        case .invalid(let violations): return "The answer does not match the schema (\(tries)):\n\(bulleted(violations))"
        }
    }
}

/// Asks until the answer is valid, at most `attempts` times, and returns the last result in any case. The request takes
/// the place of the turn at `index`, as in `send`, or else comes last.
///
/// An answer is cut off after `maxNewTokens`, because a model that doesn't stop would fill the context. With the
/// schema's compiled grammar, an answer that is not cut off is valid at the first attempt.
public func askStructured(
    _ conversation: Conversation, _ request: String, _ schema: Schema, attempts: Int = 3, maxNewTokens: Int = longestAnswer,
    grammar: ByteGrammar? = nil, at index: Int? = nil, isolation: isolated (any Actor)? = #isolation,
    onEvent: (Reply, ReplyEvent) -> Void = { _, _ in }
) async throws -> StructuredAnswer {
    var prompt = structuredPrompt(request, schema)
    var answer = StructuredAnswer(result: .invalid([]), attempts: 0)
    while answer.attempts < attempts {
        let last = conversation.turns.count
        let place = answer.attempts == 0 ? index ?? last : last
        let reply = try conversation.send(prompt, at: place, maxNewTokens: maxNewTokens, grammar: grammar)
        try await reply.run(onEvent: onEvent)
        answer = StructuredAnswer(result: checkStructured(reply.text, schema), attempts: answer.attempts + 1)
        guard case .invalid(let violations) = answer.result else { return answer }
        prompt = retryPrompt(violations)
    }
    return answer
}

/// The schema that the app suggests first.
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

/// How many tokens an answer may have that must end by itself: a model that doesn't stop would fill the context.
public let longestAnswer = 512

private let retry = "That answer does not match the schema:\n"
private let maxViolations = 8
private let maxStarts = 64  // each attempt may read to the end of the text

private func bulleted(_ violations: [Violation]) -> String {
    violations.prefix(maxViolations).map { "- \($0.path): \($0.message)" }.joined(separator: "\n")
}
