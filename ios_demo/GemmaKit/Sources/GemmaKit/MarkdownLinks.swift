private let maxAddress = 2000  // scalars; what is longer is no link, so that a text is read in linear time
private let maxNested = 32  // parentheses in an address

/// What follows a link's text. `address` is nil if the text ends before it does; `next` is where the text goes on.
struct Destination {
    let address: String?
    let next: Int
}

/// The destination of a link, such as `(https://a.b "title")`; nil if there is none at `start`.
func destination(_ text: Scalars, _ start: Int) -> Destination? {
    guard start < text.count, text[start] == "(" else { return nil }
    let limit = min(text.count, start + maxAddress)
    let incomplete = limit == text.count ? Destination(address: nil, next: text.count) : nil
    var at = skipSpace(text, start + 1, limit)
    let isAngled = at < limit && text[at] == "<"
    var address: Scalars = []
    var nested = 0
    if isAngled { at += 1 }
    while at < limit {
        let scalar = text[at]
        let isEscape = scalar == "\\" && at + 1 < limit && text[at + 1].isASCII && isPunctuation(text[at + 1])
        if isEscape { at += 1 }
        if !isEscape && isAngled && scalar == ">" { break }
        if isAngled && (scalar == "\n" || (!isEscape && scalar == "<")) { return nil }
        if !isAngled && scalar.value <= 32 { break }
        if !isEscape && !isAngled && scalar == "(" {
            nested += 1
            if nested > maxNested { return nil }
        }
        if !isEscape && !isAngled && scalar == ")" {
            nested -= 1
            if nested < 0 { break }
        }
        address.append(text[at])
        at += 1
    }
    if at == limit { return incomplete }
    if !isAngled && nested > 0 { return nil }
    if isAngled { at += 1 }
    let end = skipTitle(text, at, limit)
    if end >= limit { return incomplete }
    return text[end] == ")" ? Destination(address: string(address), next: end + 1) : nil
}

/// The place after white space, a title and white space; `limit` if the title doesn't end.
private func skipTitle(_ text: Scalars, _ start: Int, _ limit: Int) -> Int {
    let at = skipSpace(text, start, limit)
    guard at != start, at != limit, ["\"", "'", "("].contains(text[at]) else { return at }
    let close: Unicode.Scalar = text[at] == "(" ? ")" : text[at]
    var end = at + 1
    while end < limit && text[end] != close { end += text[end] == "\\" ? 2 : 1 }
    return skipSpace(text, min(end + 1, limit), limit)
}

private func skipSpace(_ text: Scalars, _ start: Int, _ limit: Int) -> Int {
    var at = start
    while at < limit && (isBlank(text[at]) || text[at] == "\n") { at += 1 }
    return at
}

/// The address at `start`: up to `close`, or if that is nil, up to where a bare address ends; nil if there is none.
func address(_ text: Scalars, _ start: Int, close: Unicode.Scalar?) -> Scalars? {
    guard let scheme = schemes.first(where: { text[start...].starts(with: $0) }), close != nil || scheme != schemes[2]
    else { return nil }
    let limit = min(text.count, start + maxAddress)
    let stops = close == nil ? bareStops : angledStops
    let stop: Int? = text[start..<limit].firstIndex { $0.value <= 32 || stops.contains($0) }
    var end = stop ?? limit
    if let close {
        return end < limit && text[end] == close && end > start + scheme.count ? Scalars(text[start..<end]) : nil
    }
    var opened = text[start..<end].reduce(0) { $0 + ($1 == "(" ? 1 : $1 == ")" ? -1 : 0) }
    while end > start, punctuation.contains(text[end - 1]) || (text[end - 1] == ")" && opened < 0) {
        end -= 1
        if text[end] == ")" { opened += 1 }
    }
    return end - start > scheme.count ? Scalars(text[start..<end]) : nil
}

/// An address that may be opened at a tap; others, which could name a file or run a script, are not links.
func safeLink(_ address: String) -> String? {
    let lower = Scalars(address.lowercased().unicodeScalars)
    return schemes.contains { lower.starts(with: $0) } ? address : nil
}

private let schemes: [Scalars] = ["https://", "http://", "mailto:"].map { Scalars($0.unicodeScalars) }
private let bareStops = Set("<>\"`[]|".unicodeScalars)
private let angledStops = Set("<>".unicodeScalars)
private let punctuation = Set(".,;:!?'*_~".unicodeScalars)

func isSpacing(_ scalar: Unicode.Scalar) -> Bool {
    (9...13).contains(scalar.value) || scalar.properties.generalCategory == .spaceSeparator
}

/// Whether a scalar is punctuation or a symbol.
func isPunctuation(_ scalar: Unicode.Scalar) -> Bool {
    switch scalar.properties.generalCategory {
    case .connectorPunctuation, .dashPunctuation, .openPunctuation, .closePunctuation, .initialPunctuation,
        .finalPunctuation, .otherPunctuation, .mathSymbol, .currencySymbol, .modifierSymbol, .otherSymbol:
        return true
    default: return false
    }
}
