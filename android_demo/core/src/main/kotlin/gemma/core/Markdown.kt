package gemma.core

enum class MarkdownKind { PARAGRAPH, HEADING, ITEM, CODE, TABLE, RULE }

/** Text of one look. `link` is the address of a web page or a mailbox, to open at a tap; null if there is none. */
data class MarkdownSpan(
    val text: String,
    val isBold: Boolean = false,
    val isItalic: Boolean = false,
    val isCode: Boolean = false,
    val link: String? = null,
)

/** A paragraph, heading, list item, code block, table or rule. Code and tables are monospaced and have at most one span. */
data class MarkdownBlock(
    val kind: MarkdownKind,
    val spans: List<MarkdownSpan> = emptyList(),
    val level: Int = 0, // of a heading, 1 to 6
    val depth: Int = 0, // how many lists it is in; an item counts its own
    val quote: Int = 0, // how many quotes it is in
    val marker: String = "", // what stands before an item
)

/**
 * The blocks of an answer in a subset of CommonMark, in linear time.
 *
 * Blocks: `#` headings, `-`, `*`, `+` and numbered items, fenced code, `>` quotes, rules, GitHub's tables, paragraphs.
 * An item two columns further in than an earlier one is inside of it. Line breaks are kept. Inline: `**bold**`,
 * `*italic*`, code, links, addresses. Not known, and shown as they are: HTML, entities, headings that are underlined,
 * code that is only indented, references, pictures (their text is shown).
 *
 * While an answer is still being written (`isWhole` is false), a marker at the end whose meaning is open is not shown,
 * and what a marker has opened reaches to the end.
 *
 * https://spec.commonmark.org/0.31.2/ and https://github.github.com/gfm/#tables-extension-
 */
fun parseMarkdown(text: String, isWhole: Boolean = true): List<MarkdownBlock> {
    val parser = BlockParser()
    val lines = text.split('\n').map { it.removeSuffix("\r") }
    val known = if (isWhole || !isUndecided(lines.last())) lines else lines.dropLast(1)
    known.forEach(parser::take)
    return parser.finish(isWhole)
}

/** Whether a line may still become a rule, a fence, an item, a heading or a table's second line. */
private fun isUndecided(line: String): Boolean {
    val body = line.trim(' ', '\t')
    return body.isNotEmpty() && (body.all { it in "#*_+`~>|=-: " } || itemAt(body)?.content == "")
}

private class Fence(val mark: Char, val length: Int, val indent: Int)

private class Item(val marker: String, val number: Int?, val content: String)

/** A block whose last line has not been read. */
private class OpenBlock(val kind: MarkdownKind, val depth: Int, val quote: Int, val marker: String = "") {
    val lines = ArrayList<String>()
}

/** Splits lines into blocks. */
private class BlockParser {
    private val blocks = ArrayList<(Boolean) -> MarkdownBlock>()
    private val columns = ArrayList<Int>() // of the markers of the items that a line may belong to
    private var quote = 0
    private var open: OpenBlock? = null
    private var fence: Fence? = null
    private var isAfterBlank = true

    fun take(line: String) {
        val (level, rest) = unquote(line, if (fence == null) MAX_QUOTE else quote)
        if (level != quote) leaveQuote(level)
        val (indent, body) = unindent(rest)
        isAfterBlank = body.isEmpty()
        fence?.let { return takeCode(it, rest, body) }
        when {
            body.isEmpty() -> close()
            startsFence(indent, body) || startsHeading(indent, body) || isRule(indent, body) || startsItem(indent, body) -> Unit
            startsTable(body) -> Unit
            else -> continueOrStart(indent, body)
        }
    }

    fun finish(isWhole: Boolean): List<MarkdownBlock> {
        val isOpen = open != null || !isAfterBlank
        close()
        return blocks.mapIndexed { index, make -> make(isWhole || !isOpen || index < blocks.lastIndex) }
    }

    private fun leaveQuote(level: Int) {
        close()
        fence = null
        columns.clear()
        quote = level
    }

    private fun takeCode(code: Fence, line: String, body: String) {
        if (body.length >= code.length && body.all { it == code.mark }) {
            fence = null
            close()
        } else {
            open?.lines?.add(line.drop(line.take(code.indent).takeWhile { it == ' ' }.length))
        }
    }

    private fun startsFence(indent: Int, body: String): Boolean {
        val mark = body[0]
        val length = body.takeWhile { it == mark }.length
        if (mark !in "`~" || length < 3 || (mark == '`' && '`' in body.substring(length))) return false
        begin(MarkdownKind.CODE, indent)
        fence = Fence(mark, length, indent)
        return true
    }

    private fun startsHeading(indent: Int, body: String): Boolean {
        val level = body.takeWhile { it == '#' }.length
        if (level !in 1..6 || (level < body.length && body[level] !in " \t")) return false
        begin(MarkdownKind.HEADING, indent)
        val text = body.substring(level).trim(' ', '\t')
        val end = text.trimEnd('#')
        add(if (end.isEmpty() || end.last() in " \t") end.trimEnd(' ', '\t') else text) { it.copy(level = level) }
        return true
    }

    private fun isRule(indent: Int, body: String): Boolean {
        if (body[0] !in "-*_" || body.any { it != body[0] && it !in " \t" } || body.count { it == body[0] } < 3) return false
        begin(MarkdownKind.RULE, indent)
        close()
        return true
    }

    private fun startsItem(indent: Int, body: String): Boolean {
        val item = itemAt(body) ?: return false
        val interrupts = open?.kind == MarkdownKind.PARAGRAPH && columns.isEmpty()
        if (interrupts && (item.content.isEmpty() || (item.number ?: 1) != 1)) return false
        close()
        enter(indent)
        columns += indent
        open = OpenBlock(MarkdownKind.ITEM, columns.size, quote, item.marker).also { it.lines += item.content }
        return true
    }

    /** A table begins with its second line; the first one has been taken for a paragraph's. */
    private fun startsTable(body: String): Boolean {
        val head = open?.takeIf { it.kind == MarkdownKind.PARAGRAPH || it.kind == MarkdownKind.ITEM } ?: return false
        val names = head.lines.last()
        if ('|' !in body || '|' !in names || !isTableRule(body) || tableCells(body).size != tableCells(names).size) return false
        head.lines.removeAt(head.lines.lastIndex)
        if (head.lines.isEmpty() && head.kind == MarkdownKind.PARAGRAPH) open = null
        close()
        open = OpenBlock(MarkdownKind.TABLE, head.depth, quote).also { it.lines += listOf(names, body) }
        return true
    }

    private fun continueOrStart(indent: Int, body: String) {
        if (open == null) begin(MarkdownKind.PARAGRAPH, indent)
        open?.lines?.add(body)
    }

    /** Leaves the items that a line with this indent is not inside of. */
    private fun enter(indent: Int) {
        while (columns.isNotEmpty() && columns.last() + 2 > indent) columns.removeAt(columns.lastIndex)
    }

    private fun begin(kind: MarkdownKind, indent: Int) {
        close()
        enter(indent)
        open = OpenBlock(kind, columns.size, quote)
    }

    private fun close() {
        val block = open ?: return
        when (block.kind) {
            MarkdownKind.CODE -> addPlain(block.lines.joinToString("\n"))
            MarkdownKind.TABLE -> addPlain(tableText(block.lines))
            MarkdownKind.RULE -> addPlain("")
            else -> add(block.lines.joinToString("\n")) { it }
        }
    }

    private fun addPlain(text: String) {
        val spans = if (text.isEmpty()) emptyList() else listOf(MarkdownSpan(text))
        end()?.let { block -> blocks += { _ -> block.copy(spans = spans) } }
    }

    private fun add(text: String, change: (MarkdownBlock) -> MarkdownBlock) {
        end()?.let { block -> blocks += { isWhole -> change(block.copy(spans = parseSpans(text, isWhole))) } }
    }

    private fun end(): MarkdownBlock? {
        val block = open ?: return null
        open = null
        return MarkdownBlock(block.kind, depth = block.depth, quote = block.quote, marker = block.marker)
    }
}

private const val MAX_QUOTE = 8

/** In how many quotes a line is, and what follows their markers. */
private fun unquote(line: String, most: Int): Pair<Int, String> {
    var start = 0
    var level = 0
    while (level < most) {
        var at = start
        while (at < line.length && line[at] == ' ') at++
        if (at == line.length || line[at] != '>') break
        start = if (line.getOrNull(at + 1) == ' ') at + 2 else at + 1
        level++
    }
    return level to line.substring(start)
}

/** The column where a line begins, and the line without white space around it. */
private fun unindent(line: String): Pair<Int, String> {
    var column = 0
    for (letter in line) {
        column = if (letter == ' ') column + 1 else if (letter == '\t') column / 4 * 4 + 4 else break
    }
    return column to line.trim(' ', '\t')
}

private fun itemAt(body: String): Item? {
    val digits = body.takeWhile { it in '0'..'9' }.length
    val mark = body.getOrNull(digits) ?: return null
    if (if (digits == 0) mark !in "-*+" else digits > 9 || mark !in ".)") return null
    val content = body.substring(digits + 1)
    if (content.isNotEmpty() && content[0] !in " \t") return null
    val number = body.substring(0, digits).toIntOrNull()
    return Item(if (number == null) "•" else "$number$mark", number, content.trim(' ', '\t'))
}
