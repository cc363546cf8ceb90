package gemma.core

/** The spans of a block's text: emphasis, code and links. `isWhole` as in `parseMarkdown`. */
internal fun parseSpans(text: String, isWhole: Boolean): List<MarkdownSpan> =
    SpanParser(if (isWhole) text else text.trimEnd('*', '_', '`'), isWhole).parse()

private class Node(var text: String, val isCode: Boolean = false, val link: String? = null) {
    var bold = 0 // how many more pairs begin than end before this node
    var italic = 0
}

/** A run of `*` or `_`; `length` counts those that are not used yet. */
private class Delimiter(val node: Int, val mark: Char, var length: Int, val canOpen: Boolean, val canClose: Boolean) {
    val original = length

    /** Runs that could both open and close only match if their lengths don't add up to a multiple of three, or both are one. */
    fun matches(closer: Delimiter): Boolean {
        if (mark != closer.mark) return false
        val isEither = canClose || closer.canOpen
        return !isEither || (original + closer.original) % 3 != 0 || (original % 3 == 0 && closer.original % 3 == 0)
    }
}

/** Where a link begins, to which address, and before which node it ends. */
private class Link(val start: Int, val end: Int, val address: String?)

private class Bracket(val node: Int, val delimiters: Int, val isPicture: Boolean)

/** CommonMark's algorithm of delimiter runs and brackets. */
private class SpanParser(private val text: String, private val isWhole: Boolean) {
    private val nodes = ArrayList<Node>()
    private val plain = StringBuilder()
    private val delimiters = ArrayList<Delimiter>()
    private val brackets = ArrayList<Bracket>()
    private val links = ArrayList<Link>() // inner ones before outer ones
    private var dead = 0 // so many of the first brackets are around a link, and can't be links themselves
    private val ticks = tickRuns()
    private var at = 0

    fun parse(): List<MarkdownSpan> {
        while (at < text.length) step()
        flush()
        val unmatched = pairUp(0)
        nodes += Node("") // what ends at the text's end ends here
        if (!isWhole) unmatched.forEach(::reachToTheEnd)
        return spans()
    }

    private fun step() {
        val letter = text[at]
        when {
            letter == '\\' && at + 1 < text.length && (isPunctuation(text[at + 1].code) && text[at + 1].code < 128 || text[at + 1] == '\n') -> {
                plain.append(text[at + 1])
                at += 2
            }
            letter == '`' -> code()
            letter == '*' || letter == '_' -> delimiter(letter)
            letter == '[' || (letter == '!' && text.getOrNull(at + 1) == '[') -> bracket()
            letter == ']' -> closeBracket()
            letter == '<' && address(at + 1, '>') -> Unit
            letter == 'h' && !isWordBefore() && address(at, null) -> Unit
            else -> {
                plain.append(letter)
                at++
            }
        }
    }

    private fun isWordBefore(): Boolean = at > 0 && text[at - 1].let { it in 'a'..'z' || it in 'A'..'Z' || it in '0'..'9' }

    private fun flush() {
        if (plain.isEmpty()) return
        nodes += Node(plain.toString())
        plain.setLength(0)
    }

    private fun add(node: Node): Int {
        flush()
        nodes += node
        return nodes.lastIndex
    }

    /** Where runs of backticks of each length begin. */
    private fun tickRuns(): Map<Int, ArrayDeque<Int>> {
        val runs = HashMap<Int, ArrayDeque<Int>>()
        var start = text.indexOf('`')
        while (start >= 0) {
            val length = runLength(start)
            runs.getOrPut(length) { ArrayDeque() } += start
            start = text.indexOf('`', start + length)
        }
        return runs
    }

    private fun runLength(start: Int): Int {
        var end = start
        while (end < text.length && text[end] == text[start]) end++
        return end - start
    }

    private fun code() {
        val length = runLength(at)
        val closers = ticks[length] ?: ArrayDeque()
        while (closers.isNotEmpty() && closers.first() < at + length) closers.removeFirst()
        val end = closers.firstOrNull() ?: text.length.takeIf { !isWhole }
        if (end == null) {
            plain.append(text, at, at + length)
            at += length
            return
        }
        val content = text.substring(at + length, end).replace('\n', ' ')
        val isPadded = content.length > 1 && content.first() == ' ' && content.last() == ' ' && content.any { it != ' ' }
        add(Node(if (isPadded) content.substring(1, content.length - 1) else content, isCode = true))
        at = minOf(end + length, text.length)
    }

    private fun delimiter(mark: Char) {
        val length = runLength(at)
        val before = if (at == 0) '\n'.code else text.codePointBefore(at)
        val after = if (at + length == text.length) '\n'.code else text.codePointAt(at + length)
        val opens = !isSpacing(after) && (!isPunctuation(after) || isSpacing(before) || isPunctuation(before))
        val closes = !isSpacing(before) && (!isPunctuation(before) || isSpacing(after) || isPunctuation(after))
        val isWord = mark == '_' // which may begin and end only at the edge of a word
        val node = add(Node(text.substring(at, at + length)))
        delimiters += Delimiter(
            node,
            mark,
            length,
            opens && (!isWord || !closes || isPunctuation(before)),
            closes && (!isWord || !opens || isPunctuation(after)),
        )
        at += length
    }

    /** Matches the delimiters from `first` on, and removes them; returns those that opened without a match. */
    private fun pairUp(first: Int): List<Delimiter> {
        val open = ArrayList<Delimiter>()
        val searched = HashMap<Triple<Char, Boolean, Int>, Int>() // below this, there is no match for such a closer
        for (closer in delimiters.subList(first, delimiters.size)) {
            while (closer.canClose && closer.length > 0) {
                val kind = Triple(closer.mark, closer.canOpen, closer.original % 3)
                val found = (open.lastIndex downTo (searched[kind] ?: 0)).firstOrNull { open[it].matches(closer) }
                if (found == null) {
                    searched[kind] = open.size
                    break
                }
                pair(open[found], closer)
                val kept = if (open[found].length > 0) found + 1 else found
                while (open.size > kept) open.removeAt(open.lastIndex)
                searched.keys.toList().forEach { searched[it] = minOf(searched.getValue(it), kept) }
            }
            if (closer.canOpen && closer.length > 0) open += closer
        }
        while (delimiters.size > first) delimiters.removeAt(delimiters.lastIndex)
        return open
    }

    private fun pair(opener: Delimiter, closer: Delimiter) {
        val length = if (opener.length > 1 && closer.length > 1) 2 else 1
        for (delimiter in listOf(opener, closer)) {
            delimiter.length -= length
            nodes[delimiter.node].text = delimiter.mark.toString().repeat(delimiter.length)
        }
        style(opener.node + 1, closer.node, length)
    }

    private fun style(start: Int, end: Int, length: Int) {
        if (length == 2) nodes[start].bold++ else nodes[start].italic++
        if (length == 2) nodes[end].bold-- else nodes[end].italic--
    }

    private fun reachToTheEnd(opener: Delimiter) {
        nodes[opener.node].text = ""
        if (opener.length > 1) style(opener.node + 1, nodes.lastIndex, 2)
        if (opener.length % 2 == 1) style(opener.node + 1, nodes.lastIndex, 1)
    }

    private fun bracket() {
        val isPicture = text[at] == '!'
        val mark = if (isPicture) "![" else "["
        brackets += Bracket(add(Node(mark)), delimiters.size, isPicture)
        at += mark.length
    }

    private fun closeBracket() {
        val bracket = brackets.removeLastOrNull()
        val isDead = brackets.size < dead
        dead = minOf(dead, brackets.size)
        val end = if (bracket == null || isDead && !bracket.isPicture) null else destinationAt(text, at + 1)
        if (bracket == null || end == null || (end.address == null && isWhole)) {
            plain.append(']')
            at++
            return
        }
        flush()
        pairUp(bracket.delimiters)
        nodes[bracket.node].text = ""
        while (links.isNotEmpty() && links.last().start > bracket.node) links.removeAt(links.lastIndex) // the outer one counts
        links += Link(bracket.node, nodes.size, end.address?.let(::safeLink))
        if (!bracket.isPicture) dead = brackets.size
        at = end.next
    }

    /** An address that is written out, in angle brackets or bare. */
    private fun address(start: Int, close: Char?): Boolean {
        val found = addressAt(text, start, close) ?: return false
        add(Node(found, link = safeLink(found)))
        at = start + found.length + (if (close == null) 0 else 1)
        return true
    }

    private fun spans(): List<MarkdownSpan> {
        val spans = ArrayList<MarkdownSpan>()
        val joined = StringBuilder()
        var look = MarkdownSpan("")
        fun end() {
            if (joined.isNotEmpty()) spans += look.copy(text = joined.toString())
            joined.setLength(0)
        }
        var bold = 0
        var italic = 0
        var passed = 0 // links that ended
        for ((index, node) in nodes.withIndex()) {
            bold += node.bold
            italic += node.italic
            if (node.text.isEmpty()) continue
            while (passed < links.size && links[passed].end <= index) passed++
            val around = links.getOrNull(passed)?.takeIf { it.start <= index }
            val next = MarkdownSpan("", bold > 0, italic > 0, node.isCode, if (around == null) node.link else around.address)
            if (next != look) end()
            look = next
            joined.append(node.text)
        }
        end()
        return spans
    }
}
