/// Decodes tokens one by one into whole characters. All pushes and the flush together equal `Tokenizer.decode`.
public struct StreamDecoder {
    private let tokenizer: Tokenizer
    private var pending: [UInt8] = []  // bytes of an incomplete character

    public init(_ tokenizer: Tokenizer) {
        self.tokenizer = tokenizer
    }

    /// The text that `token` completes.
    public mutating func push(_ token: Int) -> String {
        if let byte = tokenizer.byte(of: token) {
            pending.append(byte)
            return complete()
        }
        let text = tokenizer.text(of: token)
        return text.isEmpty ? "" : flush() + text
    }

    /// Ends the text: one U+FFFD for each byte of an incomplete character.
    public mutating func flush() -> String {
        take(pending.count, decode: false)
    }

    private mutating func complete() -> String {
        var out = ""
        while let first = pending.first {
            let length = sequenceLength(first)
            let checked = pending.prefix(length).enumerated().dropFirst()
            let valid = checked.prefix { continues(first, $0.offset, $0.element) }.count + 1
            if length == 0 {
                out += take(1, decode: false)
            } else if valid == length {
                out += take(length, decode: true)
            } else if valid == pending.count {
                break  // the next token may complete it
            } else {
                out += take(valid, decode: false)
            }
        }
        return out
    }

    private mutating func take(_ count: Int, decode: Bool) -> String {
        let text = decode ? String(decoding: pending.prefix(count), as: UTF8.self) : String(repeating: "\u{FFFD}", count: count)
        pending.removeFirst(count)
        return text
    }
}

/// Length in bytes of a character that starts with this byte; 0 if no character does.
private func sequenceLength(_ first: UInt8) -> Int {
    switch first {
    case 0x00...0x7F: return 1
    case 0xC2...0xDF: return 2
    case 0xE0...0xEF: return 3
    case 0xF0...0xF4: return 4
    default: return 0
    }
}

/// Whether a byte may follow the first one at an index (Unicode 15, table 3-7).
private func continues(_ first: UInt8, _ index: Int, _ byte: UInt8) -> Bool {
    switch (index, first) {
    case (1, 0xE0): return (0xA0...0xBF).contains(byte)
    case (1, 0xED): return (0x80...0x9F).contains(byte)
    case (1, 0xF0): return (0x90...0xBF).contains(byte)
    case (1, 0xF4): return (0x80...0x8F).contains(byte)
    default: return (0x80...0xBF).contains(byte)
    }
}
