import Foundation

/// Typed reads from a bundle's JSON file. A missing or mistyped field throws a bundle error that names it.
struct JSONFields {
    let file: String
    let path: String
    let value: JSON

    /// Throws a bundle error if the text is not JSON.
    static func parse(file: String, _ data: Data) throws -> JSONFields {
        guard let text = String(data: data, encoding: .utf8) else {
            throw GemmaError.bundle("\(file) is not UTF-8; copy the whole bundle folder again")
        }
        do {
            return JSONFields(file: file, path: "$", value: try parseJSON(text))
        } catch let error as GemmaError {
            throw GemmaError.bundle("\(file) can't be read: \(error.message); copy the whole bundle folder again")
        }
    }

    func of(_ name: String) throws -> JSONFields {
        guard let field = try objectFields()[name] else { throw invalid("\(path) has no \"\(name)\"") }
        return JSONFields(file: file, path: "\(path).\(name)", value: field)
    }

    /// The field, or nil if its value is null or if it is missing.
    func orNil(_ name: String) throws -> JSONFields? {
        guard let value = try objectFields()[name], value != .null else { return nil }
        return JSONFields(file: file, path: "\(path).\(name)", value: value)
    }

    func string() throws -> String {
        guard case .string(let text) = value else { throw wrong("a string") }
        return text
    }

    /// A string that is not empty.
    func text() throws -> String {
        let text = try string()
        if text.isEmpty { throw wrong("a text") }
        return text
    }

    /// Two texts.
    func pair() throws -> (opens: String, closes: String) {
        let texts = try list { try $0.string() }
        guard texts.count == 2, !texts.contains("") else { throw wrong("two texts") }
        return (texts[0], texts[1])
    }

    func boolean() throws -> Bool {
        guard case .boolean(let boolean) = value else { throw wrong("true or false") }
        return boolean
    }

    func double() throws -> Double {
        guard case .number(let number, _) = value else { throw wrong("a number") }
        return number
    }

    /// A whole number up to 2^53, beyond which a double skips whole numbers.
    func integer() throws -> Int {
        let number = try double()
        guard number == number.rounded(), abs(number) <= 9_007_199_254_740_992 else { throw wrong("a whole number") }
        return Int(number)
    }

    /// A whole number of at least 0 that fits in 32 bits.
    func count() throws -> Int {
        let number = try integer()
        guard (0...Int(Int32.max)).contains(number) else { throw wrong("a whole number of at least 0 that fits in 32 bits") }
        return number
    }

    func list<T>(_ read: (JSONFields) throws -> T) throws -> [T] {
        guard case .array(let items) = value else { throw wrong("a list") }
        return try items.enumerated().map { index, item in
            try read(JSONFields(file: file, path: "\(path)[\(index)]", value: item))
        }
    }

    func map<T>(_ read: (JSONFields) throws -> T) throws -> [String: T] {
        var fields: [String: T] = [:]
        for (name, item) in try objectFields().fields {
            fields[name] = try read(JSONFields(file: file, path: "\(path).\(name)", value: item))
        }
        return fields
    }

    func wrong(_ expected: String) -> GemmaError {
        invalid("\(path) is \(value.write().prefix(40)), expected \(expected)")
    }

    private func objectFields() throws -> JSONObject {
        guard case .object(let object) = value else { throw wrong("an object") }
        return object
    }

    private func invalid(_ what: String) -> GemmaError {
        .bundle("\(file) is not valid: \(what); export the model again")
    }
}
