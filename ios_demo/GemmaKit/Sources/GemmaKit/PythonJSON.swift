import Foundation

extension JSON {
    /// The value as Python's `json.dumps(value, ensure_ascii=False)` writes it, or with `indent=2`, over several lines.
    func pythonJSON(indented: Bool = false) -> String { written(indented, depth: 0) }

    private func written(_ indented: Bool, depth: Int) -> String {
        switch self {
        case .object(let object):
            let items = object.fields.map { "\(quoted($0.name)): \($0.value.written(indented, depth: depth + 1))" }
            return enclosed("{", items, "}", indented, depth)
        case .array(let items):
            return enclosed("[", items.map { $0.written(indented, depth: depth + 1) }, "]", indented, depth)
        case .string(let text): return quoted(text)
        case .number(let value, let whole): return whole ?? pythonNumber(value)
        case .boolean(let value): return value ? "true" : "false"
        case .null: return "null"
        }
    }
}

private func enclosed(_ opens: String, _ items: [String], _ closes: String, _ indented: Bool, _ depth: Int) -> String {
    guard indented, !items.isEmpty else { return opens + items.joined(separator: indented ? "," : ", ") + closes }
    let line = "\n" + String(repeating: "  ", count: depth)
    return opens + items.map { "\(line)  \($0)" }.joined(separator: ",") + line + closes
}

private func quoted(_ text: String) -> String {
    var out = String.UnicodeScalarView()
    for scalar in text.unicodeScalars {
        if let plain = escapes[scalar] {
            out.append(contentsOf: plain.unicodeScalars)
        } else if scalar.value < 0x20 {
            out.append(contentsOf: String(format: "\\u%04x", scalar.value).unicodeScalars)
        } else {
            out.append(scalar)
        }
    }
    return "\"\(String(out))\""
}

private let escapes: [Unicode.Scalar: String] = [
    "\"": "\\\"", "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\u{08}": "\\b", "\u{0C}": "\\f",
]

/// A number that is not written as a whole one, with the fewest digits that give it again, as Python writes it: with a point,
/// or with an exponent below 1e-4 and from 1e16 on.
func pythonNumber(_ value: Double) -> String {
    let sign = value.sign == .minus ? "-" : ""
    if value == 0 { return sign + "0.0" }
    let (digits, exponent) = shortest(abs(value))
    let fraction = digits.count > 1 ? "." + digits.dropFirst() : ""
    if !(-4...15).contains(exponent) {
        return "\(sign)\(digits.prefix(1))\(fraction)e\(exponent < 0 ? "-" : "+")" + String(format: "%02d", abs(exponent))
    }
    if exponent < 0 { return "\(sign)0.\(String(repeating: "0", count: -exponent - 1))\(digits)" }
    let padded = digits + String(repeating: "0", count: max(0, exponent + 1 - digits.count))
    let rest = padded.dropFirst(exponent + 1)
    return "\(sign)\(padded.prefix(exponent + 1)).\(rest.isEmpty ? "0" : rest)"
}

/// The digits that Swift writes, which are the fewest too, and the exponent of the first one.
private func shortest(_ value: Double) -> (digits: String, exponent: Int) {
    let parts = value.description.split(separator: "e")
    let point = parts[0].split(separator: ".", omittingEmptySubsequences: false)
    let written = point.joined()
    let zeros = written.prefix { $0 == "0" }.count
    let exponent = (parts.count > 1 ? Int(parts[1]) ?? 0 : 0) + point[0].count - 1 - zeros
    let digits = written.dropFirst(zeros)
    return (String(digits.dropLast(digits.reversed().prefix { $0 == "0" }.count)), exponent)
}
