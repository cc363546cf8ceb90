package gemma.core

private const val MAX_PADDED = 40 // columns that are wider are not padded, so that the text stays in proportion

internal fun isTableRule(line: String): Boolean = tableCells(line).all { cell ->
    val dashes = cell.removePrefix(":").removeSuffix(":")
    dashes.isNotEmpty() && dashes.all { it == '-' }
}

/** The cells of a table's line; `\|` is no border. */
internal fun tableCells(line: String): List<String> {
    val cells = ArrayList<String>()
    val cell = StringBuilder()
    var at = if (line.startsWith('|')) 1 else 0
    while (at < line.length) {
        when {
            line[at] == '\\' && line.getOrNull(at + 1) == '|' -> cell.append(line[++at])
            line[at] == '|' -> {
                cells += cell.trim(' ', '\t').toString()
                cell.setLength(0)
            }
            else -> cell.append(line[at])
        }
        at++
    }
    val rest = cell.trim(' ', '\t').toString()
    if (rest.isNotEmpty() || !line.endsWith('|')) cells += rest
    return cells
}

/** A table as monospaced text: names, a line, and rows. `lines` are as written, the second one being the rule. */
internal fun tableText(lines: List<String>): String {
    val rules = tableCells(lines[1])
    val rows = (lines.take(1) + lines.drop(2)).map { line -> tableCells(line).take(rules.size).map(::plainText) }
    val widths = rules.indices.map { column -> minOf(MAX_PADDED, rows.maxOf { row -> row.getOrNull(column)?.let(::width) ?: 0 }) }
    val texts = rows.map { row -> row.mapIndexed { column, cell -> pad(cell, widths[column], rules[column]) }.joinToString(" | ").trimEnd(' ') }
    val line = widths.joinToString("-+-") { "-".repeat(it) }
    return (texts.take(1) + line + texts.drop(1)).joinToString("\n")
}

private fun plainText(cell: String): String = parseSpans(cell, isWhole = true).joinToString("") { it.text }

private fun width(text: String): Int = text.codePointCount(0, text.length)

private fun pad(cell: String, width: Int, rule: String): String {
    val missing = maxOf(0, width - width(cell))
    val before = if (!rule.endsWith(':')) 0 else if (rule.startsWith(':')) missing / 2 else missing
    return " ".repeat(before) + cell + " ".repeat(missing - before)
}
