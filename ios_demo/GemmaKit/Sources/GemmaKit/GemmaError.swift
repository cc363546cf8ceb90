import Foundation

/// All errors. Each message is one line that says what was found, what was expected and what to do.
public enum GemmaError: Error, Equatable {
    /// A bundle is missing, altered, damaged, or has an unknown schema version.
    case bundle(String)
    /// The artifact can't be loaded or run.
    case session(String)
    /// The next tokens don't fit into the cache.
    case contextFull(String)
    /// A text can't be encoded, or the tokenizer file is damaged.
    case tokenizer(String)
    /// A bundle can't be downloaded.
    case download(String)
    /// A text is not JSON.
    case json(String)
    /// A JSON Schema is not valid or uses a keyword that is not supported.
    case schema(String)

    public var message: String {
        switch self {
        case .bundle(let text), .session(let text), .contextFull(let text), .tokenizer(let text),
            .download(let text), .json(let text), .schema(let text):
            return oneLine(text)
        }
    }
}

private let longest = 1500  // characters of a message
private let start = 1000  // characters of a longer message that are kept before the gap

/// A message as one line, as the Python runtime writes it: it may quote a file that nobody trusts. White space becomes
/// blanks, other characters that are not shown become escapes, and a long message is cut in its middle.
func oneLine(_ message: String) -> String {
    var line = String.UnicodeScalarView()
    for scalar in message.unicodeScalars {
        if scalar.properties.isWhitespace || (0x1C...0x1F).contains(scalar.value) {
            if let last = line.last, last != " " { line.append(" ") }
        } else if isHidden(scalar) {
            line.append(contentsOf: String(format: "\\u%04x", scalar.value).unicodeScalars)
        } else {
            line.append(scalar)
        }
    }
    if line.last == " " { line.removeLast() }
    if line.count <= longest { return String(line) }
    return "\(String(line.prefix(start))) … \(String(line.suffix(longest - start)))"
}

private func isHidden(_ scalar: Unicode.Scalar) -> Bool {
    switch scalar.properties.generalCategory {
    case .control, .format, .surrogate, .privateUse, .unassigned: true
    default: false
    }
}
