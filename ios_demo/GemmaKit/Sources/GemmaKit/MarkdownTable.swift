private let maxPadded = 40  // columns that are wider are not padded, so that the text stays in proportion

func isTableRule(_ line: Scalars) -> Bool {
    tableCells(line).allSatisfy { cell in
        var dashes = cell[...]
        if dashes.first == ":" { dashes.removeFirst() }
        if dashes.last == ":" { dashes.removeLast() }
        return !dashes.isEmpty && dashes.allSatisfy { $0 == "-" }
    }
}

/// The cells of a table's line; `\|` is no border.
func tableCells(_ line: Scalars) -> [Scalars] {
    var cells: [Scalars] = []
    var cell: Scalars = []
    var at = line.first == "|" ? 1 : 0
    while at < line.count {
        if line[at] == "\\" && at + 1 < line.count && line[at + 1] == "|" {
            at += 1
            cell.append(line[at])
        } else if line[at] == "|" {
            cells.append(trimmed(cell))
            cell = []
        } else {
            cell.append(line[at])
        }
        at += 1
    }
    let rest = trimmed(cell)
    if !rest.isEmpty || line.last != "|" { cells.append(rest) }
    return cells
}

/// A table as monospaced text: names, a line, and rows. `lines` are as written, the second one being the rule.
func tableText(_ lines: [Scalars]) -> String {
    let rules = tableCells(lines[1])
    let rows = (lines.prefix(1) + lines.dropFirst(2)).map { tableCells($0).prefix(rules.count).map(plainText) }
    let widths = rules.indices.map { column in
        min(maxPadded, rows.map { column < $0.count ? $0[column].count : 0 }.max() ?? 0)
    }
    var texts = rows.map { row in
        let cells = row.indices.map { pad(row[$0], widths[$0], rules[$0]) }
        var line = Scalars(cells.joined(separator: Scalars(" | ".unicodeScalars)))
        while line.last == " " { line.removeLast() }
        return string(line)
    }
    texts.insert(widths.map { String(repeating: "-", count: $0) }.joined(separator: "-+-"), at: 1)
    return texts.joined(separator: "\n")
}

private func plainText(_ cell: Scalars) -> Scalars {
    parseSpans(cell, isWhole: true).flatMap { Scalars($0.text.unicodeScalars) }
}

private func pad(_ cell: Scalars, _ width: Int, _ rule: Scalars) -> Scalars {
    let missing = max(0, width - cell.count)
    let before = rule.last != ":" ? 0 : rule.first == ":" ? missing / 2 : missing
    return Scalars(repeating: " ", count: before) + cell + Scalars(repeating: " ", count: missing - before)
}
