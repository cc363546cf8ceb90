/// The device and what was measured on it, as JSON to share.
public func reportJSON(
    device: [String: String], _ manifest: Manifest, _ found: Verification, _ latency: Latency
) -> JSON {
    .object(
        JSONObject([
            ("device", .object(JSONObject(device.sorted { $0.key < $1.key }.map { ($0.key, .string($0.value)) }))),
            ("model", .string(manifest.modelID)),
            ("target", .string(manifest.target)),
            ("recipe", .string(manifest.recipe)),
            ("codes_digest", .string(manifest.codesDigest)),
            ("verification", verificationJSON(found)),
            ("latency", latencyJSON(latency)),
        ]))
}

private func verificationJSON(_ found: Verification) -> JSON {
    .object(
        JSONObject([
            ("verdict", .string(found.verdict.rawValue)),
            ("failures", .array(found.failures.map { .string($0) })),
            ("lowering", agreementJSON(found.lowering)),
            ("scored", agreementJSON(found.scored)),
            ("decoded", agreementJSON(found.decoded)),
            ("paths", agreementJSON(found.paths)),
            ("quantization", agreementJSON(found.quantization)),
        ]))
}

private func agreementJSON(_ figures: Agreement) -> JSON {
    .object(
        JSONObject([
            ("positions", .number(Double(figures.positions))),
            ("top1", .number(figures.top1)),
            ("near_ties", .number(Double(figures.nearTies))),
            ("max_abs", .number(figures.maxAbs)),
            ("mean_abs", .number(figures.meanAbs)),
            ("mean_kl", .number(figures.meanKL)),
            ("p99_kl", .number(figures.p99KL)),
        ]))
}

private func latencyJSON(_ latency: Latency) -> JSON {
    .object(
        JSONObject([
            ("load_ms", number(latency.loadMillis)),
            ("first_token_ms", number(latency.firstTokenMillis)),
            ("tokens_per_second", number(latency.tokensPerSecond)),
            ("token_p95_ms", number(latency.tokenP95Millis)),
            ("tokens", .number(Double(latency.tokens))),
        ]))
}

private func number(_ value: Double?) -> JSON { value.map { .number($0) } ?? .null }
