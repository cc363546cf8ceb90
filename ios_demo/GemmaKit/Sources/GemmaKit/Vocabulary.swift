import Foundation

enum PieceKind: UInt8 {
    case piece, added, special, reserved, byte
}

/// The pieces of a compact tokenizer file; `compact_tokenizer.py` of the exporter documents the format.
///
/// Pieces are UTF-8 bytes: Swift's own string equality treats é and e with a combining accent as equal.
struct Vocabulary {
    let pieces: [[UInt8]]  // by id; empty for ids without a piece
    let ranks: [Int32]  // of the merge that yields the piece; -1 if there is none
    let kinds: [PieceKind]
    let byteTokens: [Int32]  // (256); -1 for bytes without a token
    let ids: [[UInt8]: Int]
    let bytes: [Int: UInt8]

    var count: Int { pieces.count }

    func isControl(_ token: Int) -> Bool { kinds[token] == .special || kinds[token] == .reserved }

    /// Throws a tokenizer error if the file is damaged or has an unknown version.
    static func parse(_ file: Data) throws -> Vocabulary {
        var reader = Reader(bytes: Array(file))
        let (count, textBytes) = try readHeader(&reader)
        let byteTokens = (0..<256).map { _ in Int32(bitPattern: reader.word()) }
        if let wrong = byteTokens.first(where: { $0 < -1 || $0 >= count }) {
            throw damaged("it has a byte token \(wrong) of \(count)")
        }
        let ranks = (0..<count).map { _ in Int32(bitPattern: reader.word()) }
        if let wrong = ranks.first(where: { $0 < -1 }) { throw damaged("it has a rank \(wrong)") }
        let lengths = (0..<count).map { _ in reader.half() }
        let kinds = try (0..<count).map { _ -> PieceKind in
            let number = reader.byte()
            guard let kind = PieceKind(rawValue: number) else { throw damaged("it has a piece of the unknown kind \(number)") }
            return kind
        }
        guard lengths.reduce(0, +) == textBytes else { throw damaged("the lengths of its pieces don't add up to its text") }
        let pieces = try lengths.map { try reader.piece($0) }
        return Vocabulary(
            pieces: pieces,
            ranks: ranks,
            kinds: kinds,
            byteTokens: byteTokens,
            ids: try idsByPiece(pieces),
            bytes: Dictionary(byteTokens.enumerated().map { (Int($1), UInt8($0)) }, uniquingKeysWith: { first, _ in first })
        )
    }
}

private let magic: UInt32 = 0x4B4F_5447  // "GTOK"
private let version: UInt32 = 1
private let headerBytes = 16 + 256 * 4
private let bytesPerPiece = 4 + 2 + 1

private func damaged(_ what: String) -> GemmaError {
    .tokenizer("the compact tokenizer file is damaged: \(what); copy the bundle again or export the model again")
}

/// Reads little-endian numbers and pieces in sequence. The caller knows from the header that they are there.
private struct Reader {
    let bytes: [UInt8]
    var at = 0

    init(bytes: [UInt8]) {
        self.bytes = bytes
    }

    mutating func byte() -> UInt8 {
        at += 1
        return bytes[at - 1]
    }

    mutating func half() -> Int { Int(byte()) | Int(byte()) << 8 }

    mutating func word() -> UInt32 { UInt32(half()) | UInt32(half()) << 16 }

    mutating func piece(_ length: Int) throws -> [UInt8] {
        let piece = Array(bytes[at..<at + length])
        at += length
        guard String(validating: piece) != nil else { throw damaged("it has a piece that is not UTF-8") }
        return piece
    }
}

extension String {
    /// The text of valid UTF-8; nil for other bytes.
    fileprivate init?(validating bytes: [UInt8]) {
        guard let text = String(bytes: bytes, encoding: .utf8) else { return nil }
        self = text
    }
}

/// The number of ids and the bytes of text; throws unless they match the size of the file.
private func readHeader(_ reader: inout Reader) throws -> (Int, Int) {
    guard reader.bytes.count >= headerBytes, reader.word() == magic else { throw damaged("it does not start with GTOK") }
    let fileVersion = reader.word()
    guard fileVersion == version else {
        throw GemmaError.tokenizer(
            "the compact tokenizer file has version \(fileVersion), this app reads \(version); export the model again"
        )
    }
    let count = Int(reader.word())
    let textBytes = Int(reader.word())
    let expected = headerBytes + count * bytesPerPiece + textBytes
    guard expected == reader.bytes.count else {
        throw damaged("it has \(reader.bytes.count) bytes, its header says \(expected)")
    }
    return (count, textBytes)
}

private func idsByPiece(_ pieces: [[UInt8]]) throws -> [[UInt8]: Int] {
    var ids: [[UInt8]: Int] = [:]
    ids.reserveCapacity(pieces.count)
    for (id, piece) in pieces.enumerated() where !piece.isEmpty {
        guard ids.updateValue(id, forKey: piece) == nil else {
            throw damaged("it has the piece \"\(String(decoding: piece, as: UTF8.self))\" twice")
        }
    }
    return ids
}
