import Foundation

/// The k largest logits at each of J judged positions, largest first.
public struct TopLogits {
    let ids: [[Int]]  // (J, k)
    let logits: [[Double]]  // (J, k)
    let logSumExp: [Double]  // (J), over the whole vocabulary

    func from(_ start: Int) -> TopLogits {
        TopLogits(ids: Array(ids[start...]), logits: Array(logits[start...]), logSumExp: Array(logSumExp[start...]))
    }
}

/// A prompt with expected logits: `reference` of the float32 weights, `quantized` of the bundle's codes.
public struct Golden {
    public let name: String
    public let tokens: [Int]
    let reference: TopLogits
    let quantized: TopLogits

    /// How many positions, counted from the end, have expected logits.
    var judged: Int { reference.ids.count }
}

/// The goldens that the exporter wrote; throws a bundle error if there are none.
public func loadGoldens(_ bundle: ModelBundle) throws -> [Golden] {
    try parseGoldens(readFile(bundle.path("goldens")))
}

func parseGoldens(_ file: Data) throws -> [Golden] {
    let goldens = try JSONFields.parse(file: "goldens.json", file).list(readGolden)
    guard !goldens.isEmpty else {
        throw GemmaError.bundle("the bundle has no goldens, so it can't be verified; export the model again")
    }
    return goldens
}

private func readGolden(_ json: JSONFields) throws -> Golden {
    let golden = Golden(
        name: try json.of("name").string(),
        tokens: try json.of("tokens").list { try $0.count() },
        reference: try readTop(json.of("reference")),
        quantized: try readTop(json.of("quantized"))
    )
    guard golden.judged >= 1, golden.judged <= golden.tokens.count, golden.quantized.ids.count == golden.judged else {
        throw json.wrong("the same number of positions in both references, at most one per token")
    }
    return golden
}

private func readTop(_ json: JSONFields) throws -> TopLogits {
    let top = TopLogits(
        ids: try json.of("ids").list { try $0.list { try $0.count() } },
        logits: try json.of("logits").list { try $0.list { try $0.double() } },
        logSumExp: try json.of("log_sum_exp").list { try $0.double() }
    )
    let sizes = top.ids.map(\.count)
    guard sizes == top.logits.map(\.count), !sizes.contains(0), sizes.count == top.logSumExp.count else {
        throw json.wrong("an id for each logit")
    }
    return top
}

/// Reduces (T, V) logits to the k largest of each row and its normalizer.
func topLogits(_ rows: [[Float]], k: Int = 32) -> TopLogits {
    let ids = rows.map { row -> [Int] in
        let threshold = kthLargest(row, k)
        let top = row.indices.filter { row[$0] >= threshold }
        return Array(top.sorted { row[$0] != row[$1] ? row[$0] > row[$1] : $0 < $1 }.prefix(k))
    }
    let logits = zip(rows, ids).map { row, top in top.map { Double(row[$0]) } }
    return TopLogits(ids: ids, logits: logits, logSumExp: rows.map(logSumExp))
}

func logSumExp(_ row: [Float]) -> Double {
    let highest = Double(row.max() ?? 0)
    return highest + log(row.reduce(0) { $0 + exp(Double($1) - highest) })
}
