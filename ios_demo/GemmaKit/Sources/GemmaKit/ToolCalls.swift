/// A reply without its calls, and the calls.
struct FoundCalls: Equatable {
    let text: String
    let calls: [ToolCall]
}

/// Finds calls between a template's marks, or else as JSON with names of tools, alone or in a list, as the whole text or in a
/// fenced block. A call that can't be read is left in the text. A chat without tools has no calls.
func findCalls(_ text: String, _ names: Set<String>, _ marks: ToolMarks?) -> FoundCalls {
    if names.isEmpty { return FoundCalls(text: text, calls: []) }
    let scalars = Array(text.unicodeScalars)
    if let marks, marks.opens(in: text) { return findMarked(scalars, marks) }
    for body in bodies(scalars) {
        let calls = readCalls(body.content)
        if !calls.isEmpty && calls.allSatisfy({ call in names.contains { sameScalars($0, call.name) } }) {
            return FoundCalls(
                text: strip(string(scalars[..<body.place.lowerBound] + scalars[body.place.upperBound...])), calls: calls)
        }
    }
    return FoundCalls(text: text, calls: [])
}

private let fence = Array("```".unicodeScalars)
private let languages = ["json", "tool_code", "tool_call", "python"].map { Array($0.unicodeScalars) }

/// Where calls can stand.
private struct Body {
    let place: Range<Int>
    let content: String
}

/// The fenced blocks, then the whole text.
private func bodies(_ text: [Unicode.Scalar]) -> [Body] {
    var bodies: [Body] = []
    var at = find(fence, in: text, from: 0)
    while let start = at {
        let body = fenced(text, start)
        if let body { bodies.append(body) }
        at = find(fence, in: text, from: body?.place.upperBound ?? start + 1)
    }
    return bodies + [Body(place: 0..<text.count, content: strip(string(text[...])))]
}

/// The block that begins with a fence at `start`; nil if there is none.
private func fenced(_ text: [Unicode.Scalar], _ start: Int) -> Body? {
    let language = start + fence.count
    var at = language + (languages.first { text[language...].starts(with: $0) }?.count ?? 0)
    while at < text.count, text[at] != "\n", isSpace(text[at]) { at += 1 }
    guard at < text.count, text[at] == "\n", let end = find(fence, in: text, from: at + 1) else { return nil }
    return Body(place: start..<end + fence.count, content: strip(string(text[(at + 1)..<end])))
}

private func readCalls(_ text: String) -> [ToolCall] {
    guard let found = try? parseJSON(text) else { return [] }
    var entries = [found]
    if case .array(let items) = found { entries = items }
    let calls = entries.compactMap(readCall)
    return calls.count == entries.count ? calls : []
}

private func readCall(_ entry: JSON) -> ToolCall? {
    guard case .object(let fields) = entry, case .string(let name)? = fields["name"] else { return nil }
    guard case .object(let arguments) = fields["parameters"] ?? fields["arguments"] ?? .object(JSONObject([])) else { return nil }
    return ToolCall(name: name, arguments: arguments)
}

private func findMarked(_ text: [Unicode.Scalar], _ marks: ToolMarks) -> FoundCalls {
    let (opens, closes) = (Array(marks.call.opens.unicodeScalars), Array(marks.call.closes.unicodeScalars))
    var calls: [ToolCall] = []
    var rest: [Unicode.Scalar] = []
    var at = 0
    while let start = find(opens, in: text, from: at) {
        let name = start + opens.count
        if name == text.count { break }
        if text[name] == "{" {  // a call without a name
            rest += text[at..<name]
            at = name
            continue
        }
        let body = text[name...].firstIndex(of: "{") ?? text.count
        let end = find(closes, in: text, from: body) ?? text.count
        let after = min(text.count, end + closes.count)
        var call = MarkedCall(trimmedEnd(text[body..<end]), quote: marks.quote)
        let arguments = call.read()
        rest += text[at..<(arguments == nil ? after : start)]
        if let arguments { calls.append(ToolCall(name: strip(string(text[name..<body])), arguments: arguments)) }
        at = after
    }
    rest += text[at...]
    return FoundCalls(text: calls.isEmpty ? string(text[...]) : strip(string(rest[...])), calls: calls)
}

private func trimmedEnd(_ text: ArraySlice<Unicode.Scalar>) -> [Unicode.Scalar] {
    Array(text.prefix((text.lastIndex { !isSpace($0) } ?? text.startIndex - 1) - text.startIndex + 1))
}

/// Reads a call's arguments between braces.
private struct MarkedCall {
    private struct Unreadable: Error {}

    private let text: [Unicode.Scalar]
    private let quote: [Unicode.Scalar]
    private var at = 0

    init(_ text: [Unicode.Scalar], quote: String) {
        self.text = text
        self.quote = Array(quote.unicodeScalars)
    }

    /// The arguments; nil if they can't be read, or more follows.
    mutating func read() -> JSONObject? {
        guard case .object(let arguments)? = try? value(depth: 0), at == text.count else { return nil }
        return arguments
    }

    private mutating func value(depth: Int) throws -> JSON {
        if depth > maxDepth { throw Unreadable() }
        if isQuoted { return .string(try quoted()) }
        switch try peek() {
        case "{": return .object(JSONObject(try fields(depth)))
        case "[":
            var values: [JSON] = []
            try items("]") { values.append(try $0.value(depth: depth + 1)) }
            return .array(values)
        default:
            let start = at
            while !",}]".unicodeScalars.contains(try peek()) { at += 1 }
            return bare(strip(string(text[start..<at])))
        }
    }

    /// A name that comes again has its last value, in its first place.
    private mutating func fields(_ depth: Int) throws -> [(name: String, value: JSON)] {
        var fields: [(name: String, value: JSON)] = []
        var places: [[UInt8]: Int] = [:]
        try items("}") { call in
            let name = try call.key()
            let value = try call.value(depth: depth + 1)
            if let place = places[Array(name.utf8)] {
                fields[place].value = value
            } else {
                places[Array(name.utf8)] = fields.count
                fields.append((name, value))
            }
        }
        return fields
    }

    private mutating func items(_ closes: Unicode.Scalar, _ read: (inout MarkedCall) throws -> Void) throws {
        at += 1
        while try peek() != closes {
            try read(&self)
            if try peek() == "," { at += 1 } else if try peek() != closes { throw Unreadable() }
        }
        at += 1
    }

    private mutating func key() throws -> String {
        let key = isQuoted ? try quoted() : strip(try upTo([":"]))
        guard try peek() == ":" else { throw Unreadable() }
        at += 1
        return key
    }

    private var isQuoted: Bool { text[at...].starts(with: quote) }

    private mutating func quoted() throws -> String {
        at += quote.count
        let inner = try upTo(quote)
        at += quote.count
        return inner
    }

    private mutating func upTo(_ mark: [Unicode.Scalar]) throws -> String {
        guard let end = find(mark, in: text, from: at) else { throw Unreadable() }
        defer { at = end }
        return string(text[at..<end])
    }

    private func peek() throws -> Unicode.Scalar {
        guard at < text.count else { throw Unreadable() }
        return text[at]
    }
}

/// A value without quotes.
private func bare(_ text: String) -> JSON {
    if let number = number(text) { return number }
    switch text.lowercased() {
    case "true": return .boolean(true)
    case "false": return .boolean(false)
    case "null", "none": return .null
    default: return .string(text)
    }
}

/// A number as JSON has it, but with leading zeros; nil for anything else, and for one too large for a double.
private func number(_ text: String) -> JSON? {
    let bytes = Array(text.utf8)
    let sign = bytes.first == UInt8(ascii: "-") ? 1 : 0
    let digits = bytes[sign...].prefix { (0x30...0x39).contains($0) }
    let zeros = min(digits.prefix { $0 == 0x30 }.count, max(0, digits.count - 1))
    let kept = bytes[..<sign] + bytes[(sign + zeros)...]
    guard !digits.isEmpty, case .number(let value, let whole)? = try? parseJSON(String(decoding: kept, as: UTF8.self)) else {
        return nil
    }
    return .number(value, whole: whole)
}
