import Foundation

/// How many times in a row the app answers calls itself, before it asks the user.
public let mostBuiltInRounds = 5

/// The result of a call that the app answers itself; nil for all others, whose results the user is asked for.
///
/// This is the place for an app's own functions. Their arguments come from a model: check them, and ask the user before anything
/// that can't be undone.
public func builtInResult(_ call: ToolCall, now: Date = Date(), zone: TimeZone = .current) -> JSON? {
    switch call.name {
    case "current_time": currentTime(now, zone)
    default: nil
    }
}

/// Gives the results of calls that the app answers itself, as long as there are no others. A call of a tool that the
/// conversation doesn't have is left open.
public func answerBuiltIn(
    _ conversation: Conversation, result: (ToolCall) -> JSON? = { builtInResult($0) },
    isolation: isolated (any Actor)? = #isolation, onEvent: (Reply, ReplyEvent) -> Void = { _, _ in }
) async throws {
    for _ in 0..<mostBuiltInRounds {
        let calls = openCalls(conversation.turns)
        let results = calls.filter { conversation.toolNames.contains($0.name) }.compactMap(result)
        if calls.isEmpty || results.count < calls.count { return }
        try await conversation.send(results: results).run(onEvent: onEvent)
    }
}

private func currentTime(_ now: Date, _ zone: TimeZone) -> JSON {
    func format(_ pattern: String) -> JSON {
        let formatter = DateFormatter()
        formatter.locale = Locale(identifier: "en_US_POSIX")
        formatter.timeZone = zone
        formatter.dateFormat = pattern
        return .string(formatter.string(from: now))
    }
    return .object(
        JSONObject([
            ("time", format("yyyy-MM-dd'T'HH:mm:ssXXX")), ("weekday", format("EEEE")), ("zone", .string(zone.identifier)),
        ]))
}

/// A reply as a screen shows it: its text, and below it the calls, as markdown.
public func shownReply(_ text: String, _ calls: [ToolCall]) -> String {
    if calls.isEmpty { return text }
    let title = calls.count == 1 ? "Calls a tool:" : "Calls \(calls.count) tools:"
    let written = "\(title)\n\n```\n\(calls.map(\.summary).joined(separator: "\n"))\n```"
    return strip(text).isEmpty ? written : "\(text)\n\n\(written)"
}

/// The turn of a tool as a screen shows it.
public func shownResult(_ turn: Message) -> String { "\(turn.name ?? "") returned: \(turn.content)" }

/// The tools that the app suggests first: it answers the second one itself.
public let exampleTools = """
    [
      {
        "name": "get_weather",
        "description": "Gets the weather in a city.",
        "parameters": {
          "type": "object",
          "properties": {
            "city": {"type": "string", "description": "The city, e.g. Rome."},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}
          },
          "required": ["city"]
        }
      },
      {
        "name": "current_time",
        "description": "Gets the date, the time and the time zone of the phone.",
        "parameters": {"type": "object", "properties": {}}
      }
    ]
    """
