/// Pieces that are matched as a whole in raw text before merging; the leftmost match wins, then the longest.
struct AddedPieces {
    private var next: [[UInt8: Int]] = [[:]]  // by node
    private var tokens: [Int] = [-1]

    init(_ vocabulary: Vocabulary) {
        for token in 0..<vocabulary.count where !vocabulary.pieces[token].isEmpty {
            if [.added, .special, .reserved].contains(vocabulary.kinds[token]) { add(vocabulary.pieces[token], token) }
        }
    }

    /// The longest piece that starts at `start`; nil if none does.
    func longest(in text: ArraySlice<UInt8>, at start: Int) -> Int? {
        var node = 0
        var best = -1
        for at in start..<text.endIndex {
            guard let child = next[node][text[at]] else { break }
            node = child
            if tokens[node] >= 0 { best = tokens[node] }
        }
        return best >= 0 ? best : nil
    }

    private mutating func add(_ piece: [UInt8], _ token: Int) {
        var node = 0
        for byte in piece {
            if let child = next[node][byte] {
                node = child
            } else {
                next[node][byte] = next.count
                node = next.count
                next.append([:])
                tokens.append(-1)
            }
        }
        tokens[node] = token
    }
}

/// The names of control tokens, which only a template may use. Reserved names count even if the vocabulary lacks them.
struct Markers {
    private let names: [[UInt8]]  // longest first
    private let firstBytes: Set<UInt8>

    init(_ vocabulary: Vocabulary) {
        names = (0..<vocabulary.count)
            .filter { vocabulary.isControl($0) }
            .map { vocabulary.pieces[$0] }
            .filter { !$0.isEmpty && reservedLength($0[...], 0) != $0.count }
            .sorted { $0.count > $1.count }
        firstBytes = Set(names.map { $0[0] } + [UInt8(ascii: "<"), UInt8(ascii: "[")])
    }

    /// The range of each marker, in order.
    func find(_ text: [UInt8]) -> [Range<Int>] {
        var ranges: [Range<Int>] = []
        var at = 0
        while at < text.count {
            let length = firstBytes.contains(text[at]) ? lengthAt(text, at) : 0
            if length > 0 { ranges.append(at..<at + length) }
            at += max(1, length)
        }
        return ranges
    }

    private func lengthAt(_ text: [UInt8], _ at: Int) -> Int {
        names.first { text[at...].starts(with: $0) }?.count ?? reservedLength(text[...], at)
    }
}

private let unused = Array("<unused".utf8)
private let reserved = ["<mask>", "[multimodal]"].map { Array($0.utf8) }

/// Length of a name such as `<unused7>`, `<mask>` or `[multimodal]` at an index; 0 if there is none.
private func reservedLength(_ text: ArraySlice<UInt8>, _ at: Int) -> Int {
    if let name = reserved.first(where: { text[at...].starts(with: $0) }) { return name.count }
    guard text[at...].starts(with: unused) else { return 0 }
    let digits = text[(at + unused.count)...].prefix { (0x30...0x39).contains($0) }
    let closed = digits.endIndex < text.endIndex && text[digits.endIndex] == UInt8(ascii: ">")
    return digits.isEmpty || !closed ? 0 : digits.endIndex + 1 - at
}
