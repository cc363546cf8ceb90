/// Tokens in, whole characters out. The pushes and the flush, joined, are what `Tokenizer.decode` gives.
public struct StreamDecoder {
    private let tokenizer: Tokenizer
    private var pending: [UInt8] = []  // the bytes of a character that is not complete

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

    /// What is left at the end: a U+FFFD for each byte of an unfinished character.
    public mutating func flush() -> String {
        take(pending.count, whole: false)
    }

    private mutating func complete() -> String {
        var out = ""
        while let first = pending.first {
            let need = sequenceLength(first)
            let checked = pending.prefix(need).enumerated().dropFirst()
            let valid = checked.prefix { continues(first, $0.offset, $0.element) }.count + 1
            if need == 0 {
                out += take(1, whole: false)
            } else if valid == need {
                out += take(need, whole: true)
            } else if valid == pending.count {
                break  // more may come
            } else {
                out += take(valid, whole: false)
            }
        }
        return out
    }

    private mutating func take(_ count: Int, whole: Bool) -> String {
        let text = whole ? String(decoding: pending.prefix(count), as: UTF8.self) : String(repeating: "\u{FFFD}", count: count)
        pending.removeFirst(count)
        return text
    }
}

/// Bytes of the character that a byte begins, 0 where none begins so.
private func sequenceLength(_ first: UInt8) -> Int {
    switch first {
    case 0x00...0x7F: return 1
    case 0xC2...0xDF: return 2
    case 0xE0...0xEF: return 3
    case 0xF0...0xF4: return 4
    default: return 0
    }
}

/// Whether a byte may stand at a place behind the first (Unicode 15, table 3-7).
private func continues(_ first: UInt8, _ place: Int, _ byte: UInt8) -> Bool {
    switch (place, first) {
    case (1, 0xE0): return (0xA0...0xBF).contains(byte)
    case (1, 0xED): return (0x80...0x9F).contains(byte)
    case (1, 0xF0): return (0x90...0xBF).contains(byte)
    case (1, 0xF4): return (0x80...0x8F).contains(byte)
    default: return (0x80...0xBF).contains(byte)
    }
}
