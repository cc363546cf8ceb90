import Foundation

/// A JSON value. Strings are compared by Unicode scalars: Swift's own `==` treats é and e with a combining accent as equal.
public indirect enum JSON: Equatable, Sendable {
    case object(JSONObject)
    case array([JSON])
    case string(String)
    /// All digits too, of a number that was written without a fraction and an exponent.
    case number(Double, whole: String? = nil)
    case boolean(Bool)
    case null

    public static func == (left: JSON, right: JSON) -> Bool {
        switch (left, right) {
        case (.object(let a), .object(let b)): return a == b
        case (.array(let a), .array(let b)): return a == b
        case (.string(let a), .string(let b)): return sameScalars(a, b)
        case (.number(let a, _), .number(let b, _)): return a == b
        case (.boolean(let a), .boolean(let b)): return a == b
        case (.null, .null): return true
        default: return false
        }
    }

    /// The value as JSON on one line; whole numbers have no fraction, NaN and infinities become null.
    public func write() -> String {
        switch self {
        case .object(let object):
            return "{" + object.fields.map { "\(quoted($0.name)): \($0.value.write())" }.joined(separator: ", ") + "}"
        case .array(let items): return "[" + items.map { $0.write() }.joined(separator: ", ") + "]"
        case .string(let text): return quoted(text)
        case .number(let value, _): return writeNumber(value)
        case .boolean(let value): return value ? "true" : "false"
        case .null: return "null"
        }
    }
}

/// Names and values in file order; equality ignores the order.
public struct JSONObject: Equatable, Sendable {
    public let fields: [(name: String, value: JSON)]

    public init(_ fields: [(name: String, value: JSON)]) {
        self.fields = fields
    }

    public subscript(name: String) -> JSON? {
        fields.first { sameScalars($0.name, name) }?.value
    }

    public static func == (left: JSONObject, right: JSONObject) -> Bool {
        left.fields.count == right.fields.count && left.fields.allSatisfy { right[$0.name] == $0.value }
    }
}

func sameScalars(_ left: String, _ right: String) -> Bool {
    left.utf8.elementsEqual(right.utf8)
}

private func writeNumber(_ value: Double) -> String {
    guard value.isFinite else { return "null" }
    return value == value.rounded() && abs(value) < 1e15 ? String(Int64(value)) : String(value)
}

private func quoted(_ text: String) -> String {
    var out = "\""
    for scalar in text.unicodeScalars {
        switch scalar {
        case "\"", "\\": out += "\\\(scalar)"
        case "\n": out += "\\n"
        case _ where scalar.value < 0x20: out += String(format: "\\u%04x", scalar.value)
        default: out.unicodeScalars.append(scalar)
        }
    }
    return out + "\""
}
