/// What loading took, once.
public struct Loading {
    public let checkMillis: Double
    public let loadMillis: Double

    public init(checkMillis: Double, loadMillis: Double) {
        self.checkMillis = checkMillis
        self.loadMillis = loadMillis
    }
}

/// The device and what was found on it, as JSON to share: figures as `verify` and `bench` name them with `--json`.
public func reportJSON(
    device: [String: String], _ bundle: ModelBundle, _ found: Verification, _ loading: Loading, _ benchmark: Benchmark
) -> JSON {
    object([
        ("device", object(device.sorted { $0.key < $1.key }.map { ($0.key, .string($0.value)) })),
        ("codes_digest", .string(bundle.manifest.codesDigest)),
        ("verify", verificationJSON(found)),
        (
            "bench",
            object([
                ("threads", .null),  // Core ML's own affair
                ("repeats", .number(Double(benchmark.repeats))),
                ("new_tokens", .number(Double(benchmark.newTokens))),
                ("bundles", .array([benchJSON(bundle, loading, benchmark)])),
            ])
        ),
    ])
}

func limitsJSON(_ limits: Limits) -> JSON {
    object([
        ("min_top1", .number(limits.minTop1)),
        ("max_mean_kl", .number(limits.maxMeanKL)),
        ("max_exact_kl", .number(limits.maxExactKL)),
        ("max_near_ties", .number(limits.maxNearTies)),
    ])
}

private func verificationJSON(_ found: Verification) -> JSON {
    object([
        ("verdict", .string(found.verdict.rawValue)),
        ("failures", .array(found.failures.map { .string($0) })),
        ("limits", limitsJSON(found.limits)),
        ("lowering", agreementJSON(found.lowering)),
        ("scored", agreementJSON(found.scored)),
        ("decoded", agreementJSON(found.decoded)),
        ("exact", found.exact.map(agreementJSON) ?? .null),
        ("engines", .null),  // another engine for the same artifact: none is here
        ("paths", agreementJSON(found.paths)),
        ("quantization", agreementJSON(found.quantization)),
        ("by_golden", object(found.byGolden.map { ($0.name, agreementJSON($0.figures)) })),
    ])
}

private func agreementJSON(_ figures: Agreement) -> JSON {
    object([
        ("positions", .number(Double(figures.positions))),
        ("top1", .number(figures.top1)),
        ("near_ties", .number(Double(figures.nearTies))),
        ("max_abs", .number(figures.maxAbs)),
        ("mean_abs", .number(figures.meanAbs)),
        ("mean_kl", .number(figures.meanKL)),
        ("p99_kl", .number(figures.p99KL)),
    ])
}

private func benchJSON(_ bundle: ModelBundle, _ loading: Loading, _ found: Benchmark) -> JSON {
    let manifest = bundle.manifest
    let caches = [AttentionKind.local, .global].map { ($0.rawValue, JSON.number(manifest.cacheBytes($0))) }
    return object([
        ("bundle", .string(bundle.directory.lastPathComponent)),
        ("model", .string(manifest.modelID)),
        ("recipe", .string(manifest.recipe)),
        ("target", .string(manifest.target)),
        ("artifact_bytes", .number(Double(manifest.artifactBytes))),
        ("cache_bytes", object(caches)),
        ("check_ms", spreadJSON(Spread([loading.checkMillis]))),
        ("load_ms", spreadJSON(Spread([loading.loadMillis]))),
        ("prompts", .array(found.prompts.map(promptJSON))),
        ("decode_tokens_per_second", spreadJSON(found.decodeTokensPerSecond)),
        ("token_ms", spreadJSON(found.tokenMillis)),
        ("token_p95_ms", spreadJSON(found.tokenP95Millis)),
        ("peak_rss_bytes", spreadJSON(Spread([peakResidentBytes()]))),
    ])
}

private func promptJSON(_ found: PromptFigures) -> JSON {
    object([
        ("tokens", .number(Double(found.tokens))),
        ("first_token_ms", spreadJSON(found.firstTokenMillis)),
        ("tokens_per_second", spreadJSON(found.tokensPerSecond)),
    ])
}

private func spreadJSON(_ spread: Spread) -> JSON {
    object([("median", .number(spread.median)), ("low", .number(spread.low)), ("high", .number(spread.high))])
}

private func object(_ fields: [(String, JSON)]) -> JSON {
    .object(JSONObject(fields.map { (name: $0.0, value: $0.1) }))
}
