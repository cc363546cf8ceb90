/// The spans of a block's text: emphasis, code and links. `isWhole` as in `parseMarkdown`.
func parseSpans(_ text: Scalars, isWhole: Bool) -> [MarkdownSpan] {
    let end = text.lastIndex { $0 != "*" && $0 != "_" && $0 != "`" }.map { $0 + 1 } ?? 0
    var parser = SpanParser(isWhole ? text : Scalars(text[..<end]), isWhole)
    return parser.parse()
}

private struct Node {
    var text: Scalars
    var isCode = false
    var link: String?  // an address that is written out
    var bold = 0  // how many more pairs begin than end before this node
    var italic = 0
}

/// A run of `*` or `_`; `length` counts those that are not used yet.
private struct Delimiter {
    let node: Int
    let mark: Unicode.Scalar
    var length: Int
    let original: Int
    let canOpen: Bool
    let canClose: Bool

    /// Runs that could both open and close only match if their lengths don't add up to a multiple of three, or both are one.
    func matches(_ closer: Delimiter) -> Bool {
        if mark != closer.mark { return false }
        let isEither = canClose || closer.canOpen
        return !isEither || (original + closer.original) % 3 != 0 || (original % 3 == 0 && closer.original % 3 == 0)
    }
}

/// Where a link begins, to which address, and before which node it ends.
private struct Link {
    let start: Int
    let end: Int
    let address: String?
}

private struct Bracket {
    let node: Int
    let delimiters: Int
    let isPicture: Bool
}

/// Closers that match the same openers.
private struct CloserKind: Hashable {
    let mark: Unicode.Scalar
    let canOpen: Bool
    let length: Int  // modulo 3
}

/// CommonMark's algorithm of delimiter runs and brackets.
private struct SpanParser {
    private let text: Scalars
    private let isWhole: Bool
    private var nodes: [Node] = []
    private var plain: Scalars = []
    private var delimiters: [Delimiter] = []
    private var brackets: [Bracket] = []
    private var links: [Link] = []  // inner ones before outer ones
    private var dead = 0  // so many of the first brackets are around a link, and can't be links themselves
    private var ticks: [Int: [Int]] = [:]  // where runs of backticks of each length begin, the last one first
    private var at = 0

    init(_ text: Scalars, _ isWhole: Bool) {
        self.text = text
        self.isWhole = isWhole
        var start = 0
        while start < text.count {
            let length = text[start] == "`" ? runLength(start) : 1
            if text[start] == "`" { ticks[length, default: []].append(start) }
            start += length
        }
        for length in ticks.keys { ticks[length]?.reverse() }
    }

    mutating func parse() -> [MarkdownSpan] {
        while at < text.count { step() }
        flush()
        let unmatched = pairUp(0)
        nodes.append(Node(text: []))  // what ends at the text's end ends here
        if !isWhole { for opener in unmatched { reachToTheEnd(opener) } }
        return spans()
    }

    private func scalar(_ index: Int) -> Unicode.Scalar? { text.indices.contains(index) ? text[index] : nil }

    private mutating func step() {
        let mark = text[at]
        let next = scalar(at + 1)
        if mark == "\\", let next, next == "\n" || next.isASCII && isPunctuation(next) {
            plain.append(next)
            at += 2
        } else if mark == "`" {
            code()
        } else if mark == "*" || mark == "_" {
            delimiter(mark)
        } else if mark == "[" || (mark == "!" && next == "[") {
            bracket()
        } else if mark == "]" {
            closeBracket()
        } else if mark == "<" && takeAddress(at + 1, ">") {
        } else if mark == "h" && !isWordBefore && takeAddress(at, nil) {
        } else {
            plain.append(mark)
            at += 1
        }
    }

    private var isWordBefore: Bool {
        guard let before = scalar(at - 1) else { return false }
        return ("a"..."z").contains(before) || ("A"..."Z").contains(before) || ("0"..."9").contains(before)
    }

    private mutating func flush() {
        if plain.isEmpty { return }
        nodes.append(Node(text: plain))
        plain = []
    }

    private mutating func add(_ node: Node) -> Int {
        flush()
        nodes.append(node)
        return nodes.count - 1
    }

    private func runLength(_ start: Int) -> Int {
        var end = start
        while end < text.count && text[end] == text[start] { end += 1 }
        return end - start
    }

    private mutating func code() {
        let length = runLength(at)
        while let first = ticks[length]?.last, first < at + length { ticks[length]?.removeLast() }
        guard let end = ticks[length]?.last ?? (isWhole ? nil : text.count) else {
            plain += text[at..<at + length]
            at += length
            return
        }
        var content = text[(at + length)..<end].map { $0 == "\n" ? " " : $0 }
        if content.count > 1, content.first == " ", content.last == " ", content.contains(where: { $0 != " " }) {
            content = Scalars(content.dropFirst().dropLast())
        }
        _ = add(Node(text: content, isCode: true))
        at = min(end + length, text.count)
    }

    private mutating func delimiter(_ mark: Unicode.Scalar) {
        let length = runLength(at)
        let before = scalar(at - 1) ?? "\n"
        let after = scalar(at + length) ?? "\n"
        let opens = !isSpacing(after) && (!isPunctuation(after) || isSpacing(before) || isPunctuation(before))
        let closes = !isSpacing(before) && (!isPunctuation(before) || isSpacing(after) || isPunctuation(after))
        let isWord = mark == "_"  // which may begin and end only at the edge of a word
        let node = add(Node(text: Scalars(text[at..<at + length])))
        delimiters.append(
            Delimiter(
                node: node, mark: mark, length: length, original: length,
                canOpen: opens && (!isWord || !closes || isPunctuation(before)),
                canClose: closes && (!isWord || !opens || isPunctuation(after))))
        at += length
    }

    /// Matches the delimiters from `first` on, and removes them; returns those that opened without a match.
    private mutating func pairUp(_ first: Int) -> [Delimiter] {
        var open: [Delimiter] = []
        var searched: [CloserKind: Int] = [:]  // below this, there is no match for such a closer
        for delimiter in delimiters[first...] {
            var closer = delimiter
            let kind = CloserKind(mark: closer.mark, canOpen: closer.canOpen, length: closer.original % 3)
            while closer.canClose && closer.length > 0 {
                guard let found = open[(searched[kind] ?? 0)...].lastIndex(where: { $0.matches(closer) }) else {
                    searched[kind] = open.count
                    break
                }
                pair(&open[found], &closer)
                let kept = open[found].length > 0 ? found + 1 : found
                open.removeSubrange(kept...)
                for kind in searched.keys { searched[kind] = min(searched[kind] ?? 0, kept) }
            }
            if closer.canOpen && closer.length > 0 { open.append(closer) }
        }
        delimiters.removeSubrange(first...)
        return open
    }

    private mutating func pair(_ opener: inout Delimiter, _ closer: inout Delimiter) {
        let length = opener.length > 1 && closer.length > 1 ? 2 : 1
        opener.length -= length
        closer.length -= length
        nodes[opener.node].text.removeLast(length)
        nodes[closer.node].text.removeLast(length)
        style(opener.node + 1, closer.node, length)
    }

    private mutating func style(_ start: Int, _ end: Int, _ length: Int) {
        if length == 2 {
            nodes[start].bold += 1
            nodes[end].bold -= 1
        } else {
            nodes[start].italic += 1
            nodes[end].italic -= 1
        }
    }

    private mutating func reachToTheEnd(_ opener: Delimiter) {
        nodes[opener.node].text = []
        if opener.length > 1 { style(opener.node + 1, nodes.count - 1, 2) }
        if opener.length % 2 == 1 { style(opener.node + 1, nodes.count - 1, 1) }
    }

    private mutating func bracket() {
        let isPicture = text[at] == "!"
        let mark: Scalars = isPicture ? ["!", "["] : ["["]
        let node = add(Node(text: mark))
        brackets.append(Bracket(node: node, delimiters: delimiters.count, isPicture: isPicture))
        at += mark.count
    }

    private mutating func closeBracket() {
        let bracket = brackets.popLast()
        let isDead = brackets.count < dead
        dead = min(dead, brackets.count)
        guard let bracket, !isDead || bracket.isPicture, let end = destination(text, at + 1), end.address != nil || !isWhole
        else {
            plain.append("]")
            at += 1
            return
        }
        flush()
        _ = pairUp(bracket.delimiters)
        nodes[bracket.node].text = []
        while let last = links.last, last.start > bracket.node { links.removeLast() }  // the outer one counts
        links.append(Link(start: bracket.node, end: nodes.count, address: end.address.flatMap(safeLink)))
        if !bracket.isPicture { dead = brackets.count }
        at = end.next
    }

    /// An address that is written out, in angle brackets or bare.
    private mutating func takeAddress(_ start: Int, _ close: Unicode.Scalar?) -> Bool {
        guard let found = address(text, start, close: close) else { return false }
        _ = add(Node(text: found, link: safeLink(string(found))))
        at = start + found.count + (close == nil ? 0 : 1)
        return true
    }

    private func spans() -> [MarkdownSpan] {
        var spans: [MarkdownSpan] = []
        var joined: Scalars = []
        var look = MarkdownSpan(text: "")
        func end() {
            if !joined.isEmpty {
                look.text = string(joined)
                spans.append(look)
            }
            joined = []
        }
        var (bold, italic) = (0, 0)
        var passed = 0  // links that ended
        for (index, node) in nodes.enumerated() {
            bold += node.bold
            italic += node.italic
            if node.text.isEmpty { continue }
            while passed < links.count && links[passed].end <= index { passed += 1 }
            let isLinked = passed < links.count && links[passed].start <= index
            let link = isLinked ? links[passed].address : node.link
            let next = MarkdownSpan(text: "", isBold: bold > 0, isItalic: italic > 0, isCode: node.isCode, link: link)
            look.text = ""
            if next != look { end() }
            look = next
            joined += node.text
        }
        end()
        return spans
    }
}
