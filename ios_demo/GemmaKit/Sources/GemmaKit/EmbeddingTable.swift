import Foundation

/// An embedding table outside the model: a mapped safetensors file, of which a token reads one row.
///
/// It has `values`, or `codes`, `scales` and perhaps `zeros`: unsigned codes, two per byte at 4 bits with the earlier one in
/// the low half. A value is scale · (code - zero); zero is half of the codes' range if the file has no zeros. As in
/// `gemma_runtime/backends/embedding_table.py`. M width, G groups per row.
public struct EmbeddingTable {
    private let file: Data
    private let parts: [String: Part]
    private let width: Int
    private let bits: Int  // of a code; 0 if the table has values

    /// Maps the file; throws a bundle error if it is not such a table of rows of `width` values.
    public init(_ path: URL, width: Int) throws {
        file = try readFile(path)
        parts = try readHeader(file, path.lastPathComponent)
        self.width = width
        let names = Set(parts.keys).subtracting(["zeros"])
        guard width > 0, names == ["values"] || names == ["codes", "scales"] else {
            throw damaged(path.lastPathComponent, "it has \(parts.keys.sorted()), expected codes and scales, or values")
        }
        let rowBytes = parts["codes"]?.columns ?? 0
        bits = rowBytes * 8 / width
        let fits = names == ["values"] ? parts["values"]?.columns == width : [4, 8].contains(bits)
        guard fits, Set(parts.values.map(\.rows)).count == 1 else {
            throw damaged(path.lastPathComponent, "its rows do not have \(width) values")
        }
    }

    /// The row of a token, (M); throws a session error if the table has no such row.
    public func row(_ token: Int) throws -> [Float] {
        guard let first = parts.values.first, (0..<first.rows).contains(token) else {
            throw GemmaError.session("the embedding table has no row \(token); export the model again")
        }
        if parts["values"] != nil { return floats("values", token) }
        let scales = floats("scales", token)  // (G)
        let codes = unpacked("codes", token, width)
        let zeros =
            parts["zeros"] == nil
            ? [Float](repeating: Float(1 << (bits - 1)), count: scales.count) : unpacked("zeros", token, scales.count)
        let group = width / max(1, scales.count)
        return codes.indices.map { (codes[$0] - zeros[$0 / group]) * scales[$0 / group] }
    }

    private func floats(_ name: String, _ token: Int) -> [Float] {
        guard let part = parts[name] else { return [] }
        return (0..<part.columns).map { column in
            let at = part.offset + (token * part.columns + column) * part.itemBytes
            let word = littleEndian(file[at..<at + part.itemBytes])
            return part.itemBytes == 4 ? Float(bitPattern: UInt32(word)) : Float(Float16(bitPattern: UInt16(word)))
        }
    }

    private func unpacked(_ name: String, _ token: Int, _ count: Int) -> [Float] {
        guard let part = parts[name] else { return [] }
        let start = part.offset + token * part.columns
        return (0..<count).map { index in
            if bits == 8 { return Float(file[start + index]) }
            let byte = file[start + index / 2]
            return Float(index % 2 == 0 ? byte & 0xF : byte >> 4)
        }
    }
}

/// The tables whose rows a graph takes as inputs, by the input's role; throws a bundle error if one is missing.
public func openTables(_ bundle: ModelBundle, _ graph: Graph) throws -> [TensorRole: EmbeddingTable] {
    var tables: [TensorRole: EmbeddingTable] = [:]
    for spec in graph.inputs {
        guard let file = tableFiles[spec.role] else { continue }
        tables[spec.role] = try EmbeddingTable(bundle.path(file), width: (spec.shape.last ?? 0) ?? 0)
    }
    return tables
}

/// Role of the file with a table, by the role of the input that takes its rows.
private let tableFiles: [TensorRole: String] = [.embeddings: "embedding", .perLayer: "per_layer"]

/// A tensor of the file: rows of items.
private struct Part {
    let itemBytes: Int
    let rows: Int
    let columns: Int
    let offset: Int
}

private let itemBytes = ["F32": 4, "F16": 2, "U8": 1]

private func littleEndian(_ bytes: Data) -> UInt64 {
    bytes.reversed().reduce(0) { $0 << 8 | UInt64($1) }
}

private func damaged(_ file: String, _ what: String) -> GemmaError {
    .bundle("\(file) is not an embedding table: \(what); copy or export the bundle again")
}

private func readHeader(_ file: Data, _ name: String) throws -> [String: Part] {
    guard file.count >= 8 else { throw damaged(name, "it ends too early") }
    let length = littleEndian(file[..<8])
    guard length <= UInt64(file.count - 8) else { throw damaged(name, "its header is not complete") }
    let start = 8 + Int(length)
    let header = try JSONFields.parse(file: name, Data(file[8..<start])).map { $0 }
    return try header.filter { $0.key != "__metadata__" }.mapValues { try readPart($0, from: start, of: file.count, name) }
}

private func readPart(_ json: JSONFields, from start: Int, of fileBytes: Int, _ name: String) throws -> Part {
    let dtype = try json.of("dtype").string()
    let shape = try json.of("shape").list { try $0.count() }
    let place = try json.of("data_offsets").list { try $0.integer() }
    guard let size = itemBytes[dtype], shape.count == 2, place.count == 2, place[0] >= 0, place[1] <= fileBytes - start,
        shape[0].multipliedReportingOverflow(by: shape[1] * size) == (place[1] - place[0], false)
    else {
        throw damaged(name, "\(json.path) is \(dtype) of the shape \(shape) at \(place)")
    }
    return Part(itemBytes: size, rows: shape[0], columns: shape[1], offset: start + place[0])
}
