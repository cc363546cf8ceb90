/// How tools get into a prompt; written by the exporter.
public enum ToolFormat: Sendable {
    /// Joined to the system turn, with the tools as JSON after it; calls are JSON, results a turn of the user.
    case prompt(String)
    /// The template's own tokens.
    case marks(ToolMarks)

    init(_ json: JSONFields) throws {
        let (prompt, marks) = (try json.orNil("prompt")?.string(), try json.orNil("marks").map(ToolMarks.init))
        switch (prompt, marks) {
        case (let prompt?, nil): self = .prompt(prompt)
        case (nil, let marks?): self = .marks(marks)
        default: throw json.wrong("either a prompt or marks")
        }
    }

    var marks: ToolMarks? {
        if case .marks(let marks) = self { marks } else { nil }
    }
}

/// The texts around declarations, calls and results, as Gemma 4's template writes them.
public struct ToolMarks: Sendable {
    let quote: String  // on both sides of a text
    let declaration: (opens: String, closes: String)
    let call: (opens: String, closes: String)
    let response: (opens: String, closes: String)
    let thought: (opens: String, closes: String)  // it stays before its calls until the user's next turn
    let unanswered: String  // after calls without results, before the content of the user's next turn
    let reply: String  // after results, before what the model says to them
    let replyAfterText: String  // the same if it has said something beside the calls
    let waits: String  // the control token with which the model waits for results

    init(_ json: JSONFields) throws {
        quote = try json.of("quote").text()
        declaration = try json.of("declaration").pair()
        call = try json.of("call").pair()
        response = try json.of("response").pair()
        thought = try json.of("thought").pair()
        unanswered = try json.of("unanswered").string()
        reply = try json.of("reply").string()
        replyAfterText = try json.of("reply_after_text").string()
        waits = try json.of("waits").text()
    }

    /// Whether a text has calls.
    func opens(in text: String) -> Bool {
        let (mark, end) = (Array(call.opens.unicodeScalars), Array("call:".unicodeScalars))
        let opens = mark.suffix(end.count).elementsEqual(end) ? mark.dropLast(end.count) : mark[...]
        return find(Array(opens), in: Array(text.unicodeScalars), from: 0) != nil
    }
}

/// Where `mark` begins in a text from a place on, compared by scalars; nil if it is not there.
func find(_ mark: [Unicode.Scalar], in text: [Unicode.Scalar], from start: Int) -> Int? {
    guard let first = mark.first else { return start <= text.count ? start : nil }
    var at = start
    while at + mark.count <= text.count {
        if text[at] == first, text[at..<at + mark.count].elementsEqual(mark) { return at }
        at += 1
    }
    return nil
}

/// The conversation as text: tools in the system turn, calls and results as JSON.
func withoutTools(_ turns: [Message], _ tools: Tools, _ prompt: String) -> [Message] {
    var texts: [Message] = []
    var rest = turns[...]
    if !tools.isEmpty {
        let system = turns.first.flatMap { $0.role == .system ? $0.content : nil } ?? ""
        let written = JSON.array(tools.functions.map(JSON.object)).pythonJSON(indented: true)
        texts.append(Message(.system, strip("\(system)\n\n\(prompt)\(written)")))
        rest = turns.drop { $0.role == .system }
    }
    for turn in rest {
        if !turn.toolCalls.isEmpty {
            texts.append(Message(.assistant, strip("\(turn.content)\n\(callText(turn.toolCalls))")))
        } else if turn.role != .tool {
            texts.append(turn)
        } else {
            let result = "```tool_output\n\(turn.content)\n```"
            if let before = texts.last, before.role == .user {  // the results of several calls are one turn
                texts[texts.count - 1] = Message(.user, "\(before.content)\n\(result)")
            } else {
                texts.append(Message(.user, result))
            }
        }
    }
    return texts
}

private func callText(_ calls: [ToolCall]) -> String {
    let written = calls.map { JSON.object(JSONObject([("name", .string($0.name)), ("parameters", .object($0.arguments))])) }
    return (written.count == 1 ? written[0] : .array(written)).pythonJSON()
}
