/// Byte pair encoding of text without added pieces: splits it into characters or their bytes and merges by rank.
struct Merges {
    let vocabulary: Vocabulary

    /// Appends the ids of UTF-8 `text`, in which U+2581 replaces spaces.
    func encode(_ text: [UInt8], into out: inout [Int]) throws {
        var symbols = Symbols(try characters(text))
        var queue = Heap<Candidate>()
        for left in symbols.tokens.indices.dropLast() { candidate(symbols, left).map { queue.push($0) } }
        while let best = queue.pop() {
            guard symbols.merge(best) else { continue }
            candidate(symbols, symbols.previous[best.left]).map { queue.push($0) }
            candidate(symbols, best.left).map { queue.push($0) }
        }
        symbols.collect(into: &out)
    }

    private func characters(_ text: [UInt8]) throws -> [Int] {
        var tokens: [Int] = []
        var at = 0
        while at < text.count {
            var end = at + 1
            while end < text.count, text[end] & 0xC0 == 0x80 { end += 1 }
            let character = Array(text[at..<end])
            if let token = vocabulary.ids[character] {
                tokens.append(token)
            } else {
                tokens += try character.map(byteToken)
            }
            at = end
        }
        return tokens
    }

    private func byteToken(_ byte: UInt8) throws -> Int {
        let token = Int(vocabulary.byteTokens[Int(byte)])
        guard token >= 0 else {
            throw GemmaError.tokenizer("the vocabulary has no token for the byte \(byte); export the model again")
        }
        return token
    }

    private func candidate(_ symbols: Symbols, _ left: Int) -> Candidate? {
        guard left >= 0, symbols.next[left] >= 0 else { return nil }
        let (leftToken, rightToken) = (symbols.tokens[left], symbols.tokens[symbols.next[left]])
        let (first, second) = (vocabulary.pieces[leftToken], vocabulary.pieces[rightToken])
        guard let merged = vocabulary.ids[first + second], vocabulary.ranks[merged] >= 0 else { return nil }
        return Candidate(
            rank: vocabulary.ranks[merged],
            leftLength: characterCount(first),
            rightLength: characterCount(second),
            left: left,
            leftToken: leftToken,
            rightToken: rightToken,
            merged: merged
        )
    }
}

func characterCount(_ piece: [UInt8]) -> Int {
    piece.reduce(0) { $0 + ($1 & 0xC0 == 0x80 ? 0 : 1) }
}

/// A pair that may be merged; pairs are ordered as in the tokenizer's list of merges.
private struct Candidate: Comparable {
    let rank: Int32
    let leftLength: Int  // characters
    let rightLength: Int
    let left: Int  // index in Symbols
    let leftToken: Int
    let rightToken: Int
    let merged: Int

    static func < (one: Candidate, other: Candidate) -> Bool {
        if one.rank != other.rank { return one.rank < other.rank }
        if one.leftLength != other.leftLength { return one.leftLength > other.leftLength }
        if one.rightLength != other.rightLength { return one.rightLength > other.rightLength }
        return one.left < other.left
    }
}

private let removed = -1

/// The tokens of a text as a linked list.
private struct Symbols {
    var tokens: [Int]
    var previous: [Int]
    var next: [Int]

    init(_ tokens: [Int]) {
        self.tokens = tokens
        previous = tokens.indices.map { $0 - 1 }
        next = tokens.indices.map { $0 + 1 < tokens.count ? $0 + 1 : -1 }
    }

    /// Merges a pair; returns false if one of its tokens was merged into another pair before.
    mutating func merge(_ pair: Candidate) -> Bool {
        let right = next[pair.left]
        guard tokens[pair.left] == pair.leftToken, right >= 0, tokens[right] == pair.rightToken else { return false }
        tokens[pair.left] = pair.merged
        tokens[right] = removed
        next[pair.left] = next[right]
        if next[right] >= 0 { previous[next[right]] = pair.left }
        return true
    }

    func collect(into out: inout [Int]) {
        var at = tokens.isEmpty ? -1 : 0
        while at >= 0 {
            out.append(tokens[at])
            at = next[at]
        }
    }
}

/// A binary heap; `pop` returns the least element.
struct Heap<Element: Comparable> {
    private(set) var elements: [Element] = []

    var least: Element? { elements.first }

    mutating func push(_ element: Element) {
        elements.append(element)
        var at = elements.count - 1
        while at > 0, elements[at] < elements[(at - 1) / 2] {
            elements.swapAt(at, (at - 1) / 2)
            at = (at - 1) / 2
        }
    }

    mutating func pop() -> Element? {
        guard let least = elements.first, let last = elements.popLast() else { return nil }
        if !elements.isEmpty {
            elements[0] = last
            sink()
        }
        return least
    }

    private mutating func sink() {
        var at = 0
        while true {
            let children = [2 * at + 1, 2 * at + 2].filter { $0 < elements.count }
            guard let child = children.min(by: { elements[$0] < elements[$1] }), elements[child] < elements[at] else { return }
            elements.swapAt(at, child)
            at = child
        }
    }
}
