/// Parses strict RFC 8259 JSON; refuses duplicate names, numbers too large for a double and unpaired surrogates.
public func parseJSON(_ text: String) throws -> JSON {
    var parser = JSONParser(Array(text.utf8), at: 0)
    let value = try parser.value(depth: 0)
    parser.skipSpace()
    guard parser.at == parser.bytes.count else { throw parser.failure("more text after the value") }
    return value
}

let maxDepth = 128

/// All digits of a number that is written without a fraction and an exponent, and without leading zeros; nil for others.
func wholeNumber(_ text: String, _ value: Double) -> String? {
    if text.utf8.contains(where: { ".eE".utf8.contains($0) }) { return nil }
    return abs(value) < 9_007_199_254_740_992 ? String(Int64(value)) : text  // from 2^53 on a double skips whole numbers
}

/// Parses one value from byte `at`, which then points after it.
struct JSONParser {
    let bytes: [UInt8]
    private(set) var at: Int

    init(_ bytes: [UInt8], at: Int) {
        self.bytes = bytes
        self.at = at
    }

    mutating func value(depth: Int) throws -> JSON {
        if depth > maxDepth { throw failure("nesting deeper than \(maxDepth) levels") }
        skipSpace()
        switch try peek() {
        case UInt8(ascii: "{"): return try object(depth)
        case UInt8(ascii: "["): return try array(depth)
        case UInt8(ascii: "\""): return .string(try string())
        case UInt8(ascii: "t"): return try word("true", .boolean(true))
        case UInt8(ascii: "f"): return try word("false", .boolean(false))
        case UInt8(ascii: "n"): return try word("null", .null)
        default: return try number()
        }
    }

    mutating func skipSpace() {
        while at < bytes.count, [0x20, 0x09, 0x0A, 0x0D].contains(bytes[at]) { at += 1 }
    }

    func failure(_ what: String) -> GemmaError { .json("not JSON: \(what) at byte \(at + 1)") }

    private func peek() throws -> UInt8 {
        guard at < bytes.count else { throw failure("unexpected end of text") }
        return bytes[at]
    }

    private mutating func expect(_ character: Character) throws {
        guard try peek() == character.asciiValue else { throw failure("expected '\(character)'") }
        at += 1
    }

    /// Consumes the next character if it is this one; returns whether it was.
    private mutating func consume(_ character: Character) throws -> Bool {
        skipSpace()
        guard try peek() == character.asciiValue else { return false }
        at += 1
        return true
    }

    private mutating func object(_ depth: Int) throws -> JSON {
        try expect("{")
        var fields: [(name: String, value: JSON)] = []
        var names: Set<[UInt8]> = []
        if try consume("}") { return .object(JSONObject([])) }
        repeat {
            skipSpace()
            let name = try string()
            skipSpace()
            try expect(":")
            guard names.insert(Array(name.utf8)).inserted else { throw failure("duplicate name \"\(name)\"") }
            fields.append((name, try value(depth: depth + 1)))
        } while try consume(",")
        try expect("}")
        return .object(JSONObject(fields))
    }

    private mutating func array(_ depth: Int) throws -> JSON {
        try expect("[")
        var items: [JSON] = []
        if try consume("]") { return .array([]) }
        repeat { items.append(try value(depth: depth + 1)) } while try consume(",")
        try expect("]")
        return .array(items)
    }

    private mutating func word(_ word: String, _ value: JSON) throws -> JSON {
        guard bytes[at...].starts(with: word.utf8) else { throw failure("an unknown word") }
        at += word.utf8.count
        return value
    }

    private mutating func number() throws -> JSON {
        let start = at
        skip("-")
        let whole = digits()
        guard whole > 0, whole == 1 || bytes[at - whole] != UInt8(ascii: "0") else { throw failure("expected a value") }
        if skip(".") { guard digits() > 0 else { throw failure("a number without digits after the point") } }
        if skip("e") || skip("E") {
            if !skip("+") { skip("-") }
            guard digits() > 0 else { throw failure("a number without digits in its exponent") }
        }
        let text = String(decoding: bytes[start..<at], as: UTF8.self)
        guard let value = Double(text), value.isFinite else { throw failure("a number too large for a double") }
        return .number(value, whole: wholeNumber(text, value))
    }

    @discardableResult
    private mutating func skip(_ character: Character) -> Bool {
        guard at < bytes.count, bytes[at] == character.asciiValue else { return false }
        at += 1
        return true
    }

    private mutating func digits() -> Int {
        let start = at
        while at < bytes.count, (0x30...0x39).contains(bytes[at]) { at += 1 }
        return at - start
    }

    private mutating func string() throws -> String {
        try expect("\"")
        var out: [UInt8] = []
        while true {
            let byte = try peek()
            if byte < 0x20 { throw failure("a control character in a string") }
            at += 1
            switch byte {
            case UInt8(ascii: "\""): return String(decoding: out, as: UTF8.self)
            case UInt8(ascii: "\\"): out += try escape()
            default: out.append(byte)
            }
        }
    }

    private mutating func escape() throws -> [UInt8] {
        let byte = try peek()
        at += 1
        let plain: [UInt8: UInt8] = [
            0x22: 0x22, 0x5C: 0x5C, 0x2F: 0x2F, 0x62: 0x08, 0x66: 0x0C, 0x6E: 0x0A, 0x72: 0x0D, 0x74: 0x09,
        ]
        if let character = plain[byte] { return [character] }
        guard byte == UInt8(ascii: "u") else { throw failure("an unknown escape") }
        var code = try fourDigits()
        if (0xD800..<0xDC00).contains(code), skip("\\"), skip("u") {
            let low = try fourDigits()
            guard (0xDC00..<0xE000).contains(low) else { throw failure("an unpaired surrogate") }
            code = 0x10000 + (code - 0xD800) << 10 + (low - 0xDC00)
        }
        guard let scalar = Unicode.Scalar(code) else { throw failure("an unpaired surrogate") }
        return Array(String(Character(scalar)).utf8)
    }

    private mutating func fourDigits() throws -> UInt32 {
        let digits = bytes[at..<min(at + 4, bytes.count)]
        let hexadecimal = digits.allSatisfy { Character(Unicode.Scalar($0)).isHexDigit }
        guard digits.count == 4, hexadecimal, let code = UInt32(String(decoding: digits, as: UTF8.self), radix: 16) else {
            throw failure("\\u without four hexadecimal digits")
        }
        at += 4
        return code
    }
}
