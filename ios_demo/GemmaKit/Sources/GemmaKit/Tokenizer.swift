import Foundation

/// A part of a template: a control token, or the text between two.
public enum TextPart: Equatable {
    case control(Int)
    case text(String)
}

/// Turns text into token ids and back. Only a template can write control tokens; a user's text never becomes one.
public final class Tokenizer {
    private let vocabulary: Vocabulary
    private let merges: Merges
    private let added: AddedPieces
    private let markers: Markers

    /// Throws a tokenizer error if the file is damaged.
    public init(_ file: Data) throws {
        vocabulary = try Vocabulary.parse(file)
        merges = Merges(vocabulary: vocabulary)
        added = AddedPieces(vocabulary)
        markers = Markers(vocabulary)
    }

    /// The bundle's tokenizer; throws a bundle error if the bundle has no compact tokenizer.
    public convenience init(_ bundle: ModelBundle) throws {
        try self.init(readFile(bundle.path("tokenizer_compact")))
    }

    /// Token ids of untrusted text, without bos and without control tokens.
    public func encode(_ text: String) throws -> [Int] {
        let bytes = Array(text.utf8)
        let tokens = try encodeRaw(bytes[...])
        return tokens.contains(where: vocabulary.isControl) ? try encodeCut(bytes) : tokens
    }

    /// Token ids of a template's text; markers such as `<end_of_turn>` become control tokens.
    public func encodeTemplate(_ text: String) throws -> [Int] {
        try splitControl(text).flatMap { part -> [Int] in
            switch part {
            case .control(let token): return [token]
            case .text(let text): return try encode(text)
            }
        }
    }

    /// Splits text into the control tokens that it names and the text between them.
    public func splitControl(_ text: String) -> [TextPart] {
        let bytes = Array(text.utf8)
        var parts: [TextPart] = []
        var start = 0
        for marker in markers.find(bytes) {
            guard let token = vocabulary.ids[Array(bytes[marker])], vocabulary.isControl(token) else { continue }
            if marker.lowerBound > start { parts.append(.text(string(bytes[start..<marker.lowerBound]))) }
            parts.append(.control(token))
            start = marker.upperBound
        }
        if start < bytes.count { parts.append(.text(string(bytes[start...]))) }
        return parts
    }

    /// The text of `tokens` without control tokens; each byte that is not valid UTF-8 becomes U+FFFD.
    public func decode(_ tokens: [Int]) -> String {
        var stream = StreamDecoder(self)
        return tokens.map { stream.push($0) }.joined() + stream.flush()
    }

    /// The text of `tokens` with the names of control tokens.
    func decodeWhole(_ tokens: [Int]) -> String {
        var stream = StreamDecoder(self)
        let parts = tokens.map { isControl($0) ? stream.flush() + string(vocabulary.pieces[$0][...]) : stream.push($0) }
        return parts.joined() + stream.flush()
    }

    /// The token with a name such as `<|channel>`; nil if there is none.
    func token(named name: String) -> Int? { vocabulary.ids[Array(name.utf8)] }

    /// The byte that a byte token stands for; nil for other tokens.
    func byte(of token: Int) -> UInt8? { vocabulary.bytes[token] }

    /// The text of a token; empty for control tokens and unknown ids.
    func text(of token: Int) -> String {
        guard (0..<vocabulary.count).contains(token), !isControl(token) else { return "" }
        return string(vocabulary.pieces[token][...]).replacingOccurrences(of: "\u{2581}", with: " ", options: .literal)
    }

    private func isControl(_ token: Int) -> Bool { (0..<vocabulary.count).contains(token) && vocabulary.isControl(token) }

    private func encodeRaw(_ text: ArraySlice<UInt8>) throws -> [Int] {
        var out: [Int] = []
        var start = text.startIndex
        var at = start
        while at < text.endIndex {
            let token = added.longest(in: text, at: at)
            let length = token.map { vocabulary.pieces[$0].count } ?? 1
            if let token, vocabulary.kinds[token] != .special {  // a special token's name is encoded as plain letters
                try encodePlain(text[start..<at], into: &out)
                out.append(token)
                start = at + length
            }
            at += length
        }
        try encodePlain(text[start...], into: &out)
        return out
    }

    private func encodePlain(_ text: ArraySlice<UInt8>, into out: inout [Int]) throws {
        guard !text.isEmpty else { return }
        try merges.encode(text.flatMap { $0 == 0x20 ? space : [$0] }, into: &out)
    }

    /// Encodes text that names control tokens: splits it after the first character of each name, so none is matched.
    private func encodeCut(_ text: [UInt8]) throws -> [Int] {
        let cuts = [0] + markers.find(text).map { $0.lowerBound + 1 } + [text.count]
        let tokens = try zip(cuts, cuts.dropFirst()).flatMap { try encodeRaw(text[$0..<$1]) }
        if let control = tokens.first(where: vocabulary.isControl) {
            throw GemmaError.tokenizer(
                "the text would become the control token \(string(vocabulary.pieces[control][...])); remove it"
            )
        }
        return tokens
    }
}

private let space = Array("\u{2581}".utf8)

private func string(_ bytes: ArraySlice<UInt8>) -> String { String(decoding: bytes, as: UTF8.self) }
