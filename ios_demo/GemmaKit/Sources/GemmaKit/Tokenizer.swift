import Foundation

/// A part of a template's text: a control token, or the text between two.
public enum TextPart: Equatable {
    case control(Int)
    case text(String)
}

/// Text to token ids and back, with a wall between what a template writes and what a user writes.
public final class Tokenizer {
    private let vocabulary: Vocabulary
    private let merges: Merges
    private let added: AddedPieces
    private let markers: Markers

    /// Throws a tokenizer error for a damaged file.
    public init(_ file: Data) throws {
        vocabulary = try Vocabulary.parse(file)
        merges = Merges(vocabulary: vocabulary)
        added = AddedPieces(vocabulary)
        markers = Markers(vocabulary)
    }

    /// The bundle's tokenizer; throws a bundle error if it has none for phones.
    public convenience init(_ bundle: ModelBundle) throws {
        try self.init(readFile(bundle.path("tokenizer_compact")))
    }

    /// Ids of text that anyone may have written, without bos: none is a control token.
    public func encode(_ text: String) throws -> [Int] {
        let bytes = Array(text.utf8)
        let tokens = try encodeRaw(bytes[...])
        return tokens.contains(where: vocabulary.isControl) ? try encodeCut(bytes) : tokens
    }

    /// Ids of a template's text: markers such as `<end_of_turn>` become their tokens.
    public func encodeTemplate(_ text: String) throws -> [Int] {
        try splitControl(text).flatMap { part -> [Int] in
            switch part {
            case .control(let token): return [token]
            case .text(let text): return try encode(text)
            }
        }
    }

    /// The control tokens that a text names, and the text between them, in order.
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

    /// Text of `tokens`: control tokens left out, a U+FFFD for each byte that is not UTF-8.
    public func decode(_ tokens: [Int]) -> String {
        var stream = StreamDecoder(self)
        return tokens.map { stream.push($0) }.joined() + stream.flush()
    }

    /// The byte that a token stands for, nil for other tokens.
    func byte(of token: Int) -> UInt8? { vocabulary.bytes[token] }

    /// What a token stands for; empty for control and unknown tokens.
    func text(of token: Int) -> String {
        guard (0..<vocabulary.count).contains(token), !vocabulary.isControl(token) else { return "" }
        return string(vocabulary.pieces[token][...]).replacingOccurrences(of: "\u{2581}", with: " ", options: .literal)
    }

    private func encodeRaw(_ text: ArraySlice<UInt8>) throws -> [Int] {
        var out: [Int] = []
        var start = text.startIndex
        var at = start
        while at < text.endIndex {
            let token = added.longest(in: text, at: at)
            let length = token.map { vocabulary.pieces[$0].count } ?? 1
            if let token, vocabulary.kinds[token] != .special {  // whose name is letters
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

    /// Encodes text that names reserved tokens, cut behind the first character of each name.
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
