public enum MarkdownKind: String, Sendable {
    case paragraph, heading, item, code, table, rule
}

/// Text of one look. `link` is the address of a web page or a mailbox, to open at a tap; nil if there is none.
public struct MarkdownSpan: Equatable, Sendable {
    public var text: String
    public var isBold = false
    public var isItalic = false
    public var isCode = false
    public var link: String?
}

/// A paragraph, heading, list item, code block, table or rule. Code and tables are monospaced and have at most one span.
public struct MarkdownBlock: Equatable, Sendable {
    public let kind: MarkdownKind
    public var spans: [MarkdownSpan] = []
    public var level = 0  // of a heading, 1 to 6
    public var depth = 0  // how many lists it is in; an item counts its own
    public var quote = 0  // how many quotes it is in
    public var marker = ""  // what stands before an item

    /// Its text without looks.
    public var text: String { spans.map(\.text).joined() }
}

/// The blocks of an answer in a subset of CommonMark, in linear time.
///
/// Blocks: `#` headings, `-`, `*`, `+` and numbered items, fenced code, `>` quotes, rules, GitHub's tables, paragraphs.
/// An item two columns further in than an earlier one is inside of it. Line breaks are kept. Inline: `**bold**`,
/// `*italic*`, code, links, addresses. Not known, and shown as they are: HTML, entities, headings that are underlined,
/// code that is only indented, references, pictures (their text is shown).
///
/// While an answer is still being written (`isWhole` is false), a marker at the end whose meaning is open is not shown,
/// and what a marker has opened reaches to the end.
///
/// https://spec.commonmark.org/0.31.2/ and https://github.github.com/gfm/#tables-extension-
public func parseMarkdown(_ text: String, isWhole: Bool = true) -> [MarkdownBlock] {
    var parser = BlockParser()
    var lines = Array(text.unicodeScalars).split(separator: "\n", omittingEmptySubsequences: false).map { line in
        Scalars(line.last == "\r" ? line.dropLast() : line)
    }
    if !isWhole, let last = lines.last, isUndecided(last) { lines.removeLast() }
    for line in lines { parser.take(line) }
    return parser.finish(isWhole)
}

typealias Scalars = [Unicode.Scalar]

func string(_ scalars: some Sequence<Unicode.Scalar>) -> String {
    var view = String.UnicodeScalarView()
    view.append(contentsOf: scalars)
    return String(view)
}

func isBlank(_ scalar: Unicode.Scalar) -> Bool { scalar == " " || scalar == "\t" }

/// Without spaces and tabs around it.
func trimmed(_ line: Scalars) -> Scalars {
    guard let start = line.firstIndex(where: { !isBlank($0) }) else { return [] }
    let end = line.lastIndex { !isBlank($0) } ?? start
    return Scalars(line[start...end])
}

/// Whether a line may still become a rule, a fence, an item, a heading or a table's second line.
private func isUndecided(_ line: Scalars) -> Bool {
    let body = trimmed(line)
    let marks = Scalars("#*_+`~>|=-: ".unicodeScalars)
    return !body.isEmpty && (body.allSatisfy(marks.contains) || item(body)?.content.isEmpty == true)
}

private struct Fence {
    let mark: Unicode.Scalar
    let length: Int
    let indent: Int
}

private struct Item {
    let marker: String
    let number: Int?
    let content: Scalars
}

/// A block whose last line has not been read.
private struct OpenBlock {
    let kind: MarkdownKind
    let depth: Int
    let quote: Int
    var marker = ""
    var level = 0
    var lines: [Scalars] = []
}

/// A block whose spans have not been read, unless it has none to read.
private struct ReadBlock {
    let block: MarkdownBlock
    let text: Scalars?
}

/// Splits lines into blocks.
private struct BlockParser {
    private var blocks: [ReadBlock] = []
    private var columns: [Int] = []  // of the markers of the items that a line may belong to
    private var quote = 0
    private var open: OpenBlock?
    private var fence: Fence?
    private var isAfterBlank = true

    mutating func take(_ line: Scalars) {
        let (level, rest) = unquote(line, fence == nil ? maxQuote : quote)
        if level != quote { leaveQuote(level) }
        let (indent, body) = unindent(rest)
        isAfterBlank = body.isEmpty
        if let fence { return takeCode(fence, rest, body) }
        if body.isEmpty { return close() }
        if startsFence(indent, body) || startsHeading(indent, body) || isRule(indent, body) || startsItem(indent, body)
            || startsTable(body)
        {
            return
        }
        if open == nil { begin(.paragraph, indent) }
        open?.lines.append(body)
    }

    mutating func finish(_ isWhole: Bool) -> [MarkdownBlock] {
        let isOpen = open != nil || !isAfterBlank
        close()
        return blocks.enumerated().map { index, read in
            var block = read.block
            if let text = read.text {
                block.spans = parseSpans(text, isWhole: isWhole || !isOpen || index < blocks.count - 1)
            }
            return block
        }
    }

    private mutating func leaveQuote(_ level: Int) {
        close()
        fence = nil
        columns = []
        quote = level
    }

    private mutating func takeCode(_ code: Fence, _ line: Scalars, _ body: Scalars) {
        if body.count >= code.length && body.allSatisfy({ $0 == code.mark }) {
            fence = nil
            close()
        } else {
            let indent = line.prefix(code.indent).prefix { $0 == " " }.count
            open?.lines.append(Scalars(line.dropFirst(indent)))
        }
    }

    private mutating func startsFence(_ indent: Int, _ body: Scalars) -> Bool {
        let mark = body[0]
        let length = body.prefix { $0 == mark }.count
        guard mark == "`" || mark == "~", length >= 3, mark == "~" || !body[length...].contains("`") else { return false }
        begin(.code, indent)
        fence = Fence(mark: mark, length: length, indent: indent)
        return true
    }

    private mutating func startsHeading(_ indent: Int, _ body: Scalars) -> Bool {
        let level = body.prefix { $0 == "#" }.count
        guard (1...6).contains(level), level == body.count || isBlank(body[level]) else { return false }
        begin(.heading, indent)
        open?.level = level
        let text = trimmed(Scalars(body[level...]))
        let end = text.lastIndex { $0 != "#" }.map { text[...$0] } ?? []
        open?.lines = [end.last.map(isBlank) ?? true ? trimmed(Scalars(end)) : text]
        close()
        return true
    }

    private mutating func isRule(_ indent: Int, _ body: Scalars) -> Bool {
        let mark = body[0]
        guard mark == "-" || mark == "*" || mark == "_", body.allSatisfy({ $0 == mark || isBlank($0) }) else { return false }
        guard body.filter({ $0 == mark }).count >= 3 else { return false }
        begin(.rule, indent)
        close()
        return true
    }

    private mutating func startsItem(_ indent: Int, _ body: Scalars) -> Bool {
        guard let item = item(body) else { return false }
        let interrupts = open?.kind == .paragraph && columns.isEmpty
        if interrupts && (item.content.isEmpty || (item.number ?? 1) != 1) { return false }
        close()
        enter(indent)
        columns.append(indent)
        open = OpenBlock(kind: .item, depth: columns.count, quote: quote, marker: item.marker, lines: [item.content])
        return true
    }

    /// A table begins with its second line; the first one has been taken for a paragraph's.
    private mutating func startsTable(_ body: Scalars) -> Bool {
        guard var head = open, head.kind == .paragraph || head.kind == .item, let names = head.lines.last else { return false }
        guard body.contains("|"), names.contains("|"), isTableRule(body), tableCells(body).count == tableCells(names).count
        else { return false }
        head.lines.removeLast()
        open = head.lines.isEmpty && head.kind == .paragraph ? nil : head
        close()
        open = OpenBlock(kind: .table, depth: head.depth, quote: quote, lines: [names, body])
        return true
    }

    /// Leaves the items that a line with this indent is not inside of.
    private mutating func enter(_ indent: Int) {
        while let last = columns.last, last + 2 > indent { columns.removeLast() }
    }

    private mutating func begin(_ kind: MarkdownKind, _ indent: Int) {
        close()
        enter(indent)
        open = OpenBlock(kind: kind, depth: columns.count, quote: quote)
    }

    private mutating func close() {
        guard let open else { return }
        self.open = nil
        var block = MarkdownBlock(
            kind: open.kind, level: open.level, depth: open.depth, quote: open.quote, marker: open.marker)
        let text = Scalars(open.lines.joined(separator: ["\n"]))
        switch open.kind {
        case .code, .table, .rule:
            let plain = open.kind == .table ? tableText(open.lines) : string(text)
            if !plain.isEmpty { block.spans = [MarkdownSpan(text: plain)] }
            blocks.append(ReadBlock(block: block, text: nil))
        case .paragraph, .heading, .item: blocks.append(ReadBlock(block: block, text: text))
        }
    }
}

private let maxQuote = 8

/// In how many quotes a line is, and what follows their markers.
private func unquote(_ line: Scalars, _ most: Int) -> (Int, Scalars) {
    var start = 0
    var level = 0
    while level < most {
        let at = line[start...].firstIndex { $0 != " " } ?? line.count
        if at == line.count || line[at] != ">" { break }
        start = at + 1 < line.count && line[at + 1] == " " ? at + 2 : at + 1
        level += 1
    }
    return (level, start == 0 ? line : Scalars(line[start...]))
}

/// The column where a line begins, and the line without white space around it.
private func unindent(_ line: Scalars) -> (Int, Scalars) {
    var column = 0
    for scalar in line {
        if scalar == " " { column += 1 } else if scalar == "\t" { column = column / 4 * 4 + 4 } else { break }
    }
    return (column, trimmed(line))
}

private func item(_ body: Scalars) -> Item? {
    let digits = body.prefix { ("0"..."9").contains($0) }.count
    guard digits < body.count else { return nil }
    let mark = body[digits]
    let marks: Scalars = digits == 0 ? ["-", "*", "+"] : [".", ")"]
    guard marks.contains(mark), digits <= 9 else { return nil }
    let content = Scalars(body[(digits + 1)...])
    if let first = content.first, !isBlank(first) { return nil }
    let number = Int(string(body[..<digits]))
    return Item(marker: number.map { "\($0)\(mark)" } ?? "•", number: number, content: trimmed(content))
}
