/// How long checking and loading a bundle took.
public struct Loading: Sendable {
    public let checkMs: Double
    public let loadMs: Double

    public init(checkMs: Double, loadMs: Double) {
        self.checkMs = checkMs
        self.loadMs = loadMs
    }
}

/// The device and its results as JSON, which `gemma-runtime report` reads, with the names of `verify --json`,
/// `bench --json` and `bench --sustained --json`. What was not measured is null.
public func reportJSON(
    device: [String: String], _ bundle: ModelBundle, _ verification: Verification?, _ loading: Loading,
    _ benchmark: Benchmark?, _ sustained: Sustained?
) throws -> JSON {
    object([
        ("device", object(device.sorted { $0.key < $1.key }.map { ($0.key, .string($0.value)) })),
        ("bundle", .string(bundle.directory.lastPathComponent)),
        ("digest", .string(try bundle.digest())),
        ("codes_digest", .string(bundle.manifest.codesDigest)),
        ("verify", verification.map(verificationJSON) ?? .null),
        ("bench", benchmark.map { benchmarkJSON(bundle, loading, $0) } ?? .null),
        ("sustained", sustained.map(sustainedJSON) ?? .null),
    ])
}

private func benchmarkJSON(_ bundle: ModelBundle, _ loading: Loading, _ benchmark: Benchmark) -> JSON {
    object([
        ("threads", .null),  // the runtime decides
        ("repeats", .number(Double(benchmark.repeats))),
        ("new_tokens", .number(Double(benchmark.newTokens))),
        ("bundles", .array([benchJSON(bundle, loading, benchmark)])),
    ])
}

private func sustainedJSON(_ sustained: Sustained) -> JSON {
    object([
        ("sustained_minutes", .number(sustained.minutes)),
        ("round_tokens", .number(Double(sustained.roundTokens))),
        ("prompt_tokens", .number(Double(sustained.promptTokens))),
        ("new_tokens", .number(Double(sustained.newTokens))),
        ("first", .number(sustained.first)),
        ("last", .number(sustained.last)),
        ("lowest", .number(sustained.lowest)),
        ("spans", .array(sustained.spans.map(spanJSON))),
    ])
}

private func spanJSON(_ span: Span) -> JSON {
    object([
        ("seconds", .number(span.seconds)),
        ("tokens_per_second", .number(span.tokensPerSecond)),
        ("thermal", span.condition.thermal.map { .string($0) } ?? .null),
        ("memory_bytes", span.condition.memoryBytes.map { .number($0) } ?? .null),
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

private func verificationJSON(_ verification: Verification) -> JSON {
    object([
        ("verdict", .string(verification.verdict.rawValue)),
        ("failures", .array(verification.failures.map { .string($0) })),
        ("limits", limitsJSON(verification.limits)),
        ("lowering", agreementJSON(verification.lowering)),
        ("scored", agreementJSON(verification.scored)),
        ("decoded", agreementJSON(verification.decoded)),
        ("exact", verification.exact.map(agreementJSON) ?? .null),
        ("engines", .null),  // phones have no second engine for the same artifact
        ("paths", agreementJSON(verification.paths)),
        ("quantization", agreementJSON(verification.quantization)),
        ("by_golden", object(verification.byGolden.map { ($0.name, agreementJSON($0.figures)) })),
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

private func benchJSON(_ bundle: ModelBundle, _ loading: Loading, _ benchmark: Benchmark) -> JSON {
    let manifest = bundle.manifest
    let caches = [AttentionKind.local, .global].map { ($0.rawValue, JSON.number(manifest.cacheBytes($0))) }
    return object([
        ("bundle", .string(bundle.directory.lastPathComponent)),
        ("model", .string(manifest.modelID)),
        ("recipe", .string(manifest.recipe)),
        ("target", .string(manifest.target)),
        ("artifact_bytes", .number(Double(manifest.artifactBytes))),
        ("cache_bytes", object(caches)),
        ("check_ms", spreadJSON(Spread([loading.checkMs]))),
        ("load_ms", spreadJSON(Spread([loading.loadMs]))),
        ("prompts", .array(benchmark.prompts.map(promptJSON))),
        ("decode_tokens_per_second", spreadJSON(benchmark.decodeTokensPerSecond)),
        ("token_ms", spreadJSON(benchmark.tokenMs)),
        ("token_p95_ms", spreadJSON(benchmark.tokenP95Ms)),
        ("peak_rss_bytes", spreadJSON(Spread([peakResidentBytes()]))),
    ])
}

private func promptJSON(_ figures: PromptFigures) -> JSON {
    object([
        ("tokens", .number(Double(figures.tokens))),
        ("first_token_ms", spreadJSON(figures.firstTokenMs)),
        ("tokens_per_second", spreadJSON(figures.tokensPerSecond)),
        ("decode_tokens_per_second", figures.decodeTokensPerSecond.map(spreadJSON) ?? .null),
    ])
}

private func spreadJSON(_ spread: Spread) -> JSON {
    object([("median", .number(spread.median)), ("low", .number(spread.low)), ("high", .number(spread.high))])
}

private func object(_ fields: [(String, JSON)]) -> JSON {
    .object(JSONObject(fields.map { (name: $0.0, value: $0.1) }))
}
