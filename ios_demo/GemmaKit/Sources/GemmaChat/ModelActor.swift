import Foundation
import GemmaKit

/// The events of an answer, in order.
enum ChatEvent: Sendable {
    case forgot(Int)  // this many turns were forgotten, because the context was full
    case began  // a reply begins; with a schema there may be several
    case piece(String, Latency)
    case ended(StopReason?)
    case checked(String)  // the outcome of the check against the schema, as a message
}

/// Owns the model; all access to it goes through this actor. While a call is awaited the actor can be
/// entered again, so callers must wait for one call before they start the next. `ChatScreen` does.
actor ModelActor {
    private var bundle: ModelBundle?
    private var session: BundleSession?
    private var conversation: Conversation?
    private var loading = Loading(checkMs: 0, loadMs: 0)
    private var meter = LatencyMeter()
    private let open: EngineOpener

    init(open: @escaping EngineOpener) {
        self.open = open
    }

    /// Checks and loads a bundle; returns its model's name. Throws GemmaError with a message for the user.
    func load(_ directory: URL, onProgress: @Sendable (Double) -> Void) async throws -> String {
        unload()
        var check = LatencyMeter()
        check.startLoad()
        let opened = try ModelBundle.open(directory, onProgress: onProgress)
        check.loaded()
        if let reason = memoryProblem(opened.manifest, deviceBytes: Double(ProcessInfo.processInfo.physicalMemory)) {
            throw GemmaError.bundle(reason)
        }
        let codec = try ChatCodec(opened)
        meter = LatencyMeter()
        meter.startLoad()
        let loaded = try await BundleSession(opened.manifest) { [open] in try await open(opened, $0) }
        meter.loaded()
        loading = Loading(
            checkMs: check.latency.loadMs ?? 0, loadMs: meter.latency.loadMs ?? 0)
        // As Gemma's authors recommend, for bundles that say nothing.
        let sampling = try opened.manifest.sampling ?? Sampling(temperature: 1, topK: 64, topP: 0.95)
        conversation = Conversation(loaded, codec, Sampler(sampling))
        session = loaded
        bundle = opened
        return opened.manifest.modelID
    }

    func unload() {
        (bundle, session, conversation) = (nil, nil, nil)
    }

    func reset() {
        conversation?.reset()
    }

    /// Answers a question, in JSON if a schema is given. Cancelling the task stops it between two tokens.
    func answer(
        _ question: String, _ schema: Schema?, roll: Bool, _ send: @Sendable (ChatEvent) -> Void
    ) async throws {
        guard let conversation else { throw GemmaError.session("no bundle is loaded; tap Bundle and pick one") }
        conversation.roll = roll
        guard let schema else { return try await stream(conversation.send(question), send) }
        let structured = try await askStructured(conversation, question, schema) { try await self.stream($0, send) }
        send(.checked(structured.summary))
    }

    /// Verifies the bundle against its goldens and measures its speed; returns both as text and as JSON to share.
    func benchmark(onGolden: @Sendable (Int, Int) -> Void) async throws -> (summary: String, report: String) {
        guard let bundle, let session else { throw GemmaError.session("no bundle is loaded; pick one in Chat first") }
        let manifest = bundle.manifest
        let verification = try await verifyBundle(bundle, session, onGolden: onGolden)
        let workload = Workload(contextLength: manifest.contextLength)
        let benchmark = try measureSpeed(session, vocabSize: manifest.vocabSize, workload)
        let report = reportJSON(device: describeDevice(), bundle, verification, loading, benchmark).write()
        return (summary(verification, benchmark), report)
    }

    private func stream(_ reply: Reply, _ send: @Sendable (ChatEvent) -> Void) async throws {
        if reply.forgotten > 0 { send(.forgot(reply.forgotten)) }
        send(.began)
        meter.start()
        for try await piece in reply {
            meter.token()
            send(.piece(piece, meter.latency))
        }
        send(.ended(reply.reason))
    }
}

private func describeDevice() -> [String: String] {
    let process = ProcessInfo.processInfo
    return ["system": process.operatingSystemVersionString, "memory_bytes": "\(process.physicalMemory)"]
}

private func summary(_ verification: Verification, _ benchmark: Benchmark) -> String {
    let rows: [(String, Agreement?)] = [
        ("lowering", verification.lowering),
        ("whole prompts", verification.scored),
        ("token by token", verification.decoded),
        ("decoded vs scored", verification.paths),
        ("float kernels", verification.exact),
        ("quantization", verification.quantization),
    ]
    let lines = rows.compactMap { name, figures in figures.map { line(name, $0) } }
    let prompts = benchmark.prompts.map {
        String(format: "%d tokens: first token after %.0f ms", $0.tokens, $0.firstTokenMs.median)
    }
    let speed = String(
        format: "%.1f tokens/s, p95 %.0f ms", benchmark.decodeTokensPerSecond.median, benchmark.tokenP95Ms.median)
    return ([verification.verdict.rawValue] + verification.failures + lines + prompts + [speed]).joined(separator: "\n")
}

private func line(_ name: String, _ figures: Agreement) -> String {
    name
        + String(
            format: ": %d tokens, top-1 %.1f %%, near ties %d, mean KL %.1e, p99 KL %.1e",
            figures.positions, 100 * figures.top1, figures.nearTies, figures.meanKL, figures.p99KL
        )
}
