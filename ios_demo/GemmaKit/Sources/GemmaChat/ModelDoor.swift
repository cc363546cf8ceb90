import Foundation
import GemmaKit

/// What comes of a question, piece by piece.
enum ChatEvent: Sendable {
    case began  // a reply; with a schema there may be several
    case piece(String, Latency)
    case ended(StopReason?)
    case checked(String)  // against the schema, in words
}

/// The one door to the model. The model runs outside of the actor while it is awaited, so a caller begins
/// nothing before what it began has returned; `ChatScreen` sees to that.
actor ModelDoor {
    private var bundle: ModelBundle?
    private var session: BundleSession?
    private var conversation: Conversation?
    private var loading = Loading(checkMillis: 0, loadMillis: 0)
    private var meter = LatencyMeter()
    private let open: EngineOpener

    init(open: @escaping EngineOpener) {
        self.open = open
    }

    /// Checks and loads a bundle; its model's name. Throws GemmaError with a sentence for the user.
    func load(_ directory: URL, onProgress: @Sendable (Double) -> Void) async throws -> String {
        unload()
        var check = LatencyMeter()
        check.startLoad()
        let opened = try ModelBundle.open(directory, onProgress: onProgress)
        check.loaded()
        if let reason = misfit(opened.manifest, deviceBytes: Double(ProcessInfo.processInfo.physicalMemory)) {
            throw GemmaError.bundle(reason)
        }
        let voice = try Voice(opened)
        meter = LatencyMeter()
        meter.startLoad()
        let loaded = try await BundleSession(opened.manifest) { [open] in try await open(opened, $0) }
        meter.loaded()
        loading = Loading(
            checkMillis: check.latency.loadMillis ?? 0, loadMillis: meter.latency.loadMillis ?? 0)
        // What Gemma's authors advise.
        let sampling = try Sampling(temperature: 1, topK: 64, topP: 0.95)
        conversation = Conversation(loaded, voice, Sampler(sampling))
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

    /// Answers a question, in a schema if one is given. Cancelling the task ends it between two tokens.
    func answer(_ question: String, _ schema: Schema?, _ say: @Sendable (ChatEvent) -> Void) async throws {
        guard let conversation else { throw GemmaError.session("no bundle is loaded; tap Bundle and pick one") }
        guard let schema else { return try await tell(conversation.send(question), say) }
        let found = try await askStructured(conversation, question, schema) { try await self.tell($0, say) }
        say(.checked(found.inWords))
    }

    /// Replays the bundle's goldens, measures speed, and gives both as text and as JSON to share.
    func benchmark(onGolden: @Sendable (Int, Int) -> Void) async throws -> (summary: String, report: String) {
        guard let bundle, let session else { throw GemmaError.session("no bundle is loaded; pick one in Chat first") }
        let manifest = bundle.manifest
        let found = try await verifyBundle(bundle, session, onGolden: onGolden)
        let workload = Workload(contextLength: manifest.contextLength)
        let benchmark = try measureSpeed(session, vocabSize: manifest.vocabSize, workload)
        let report = reportJSON(device: describeDevice(), bundle, found, loading, benchmark).write()
        return (summary(found, benchmark), report)
    }

    private func tell(_ reply: Reply, _ say: @Sendable (ChatEvent) -> Void) async throws {
        say(.began)
        meter.start()
        for try await piece in reply {
            meter.token()
            say(.piece(piece, meter.latency))
        }
        say(.ended(reply.reason))
    }
}

private func describeDevice() -> [String: String] {
    let process = ProcessInfo.processInfo
    return ["system": process.operatingSystemVersionString, "memory_bytes": "\(process.physicalMemory)"]
}

private func summary(_ found: Verification, _ benchmark: Benchmark) -> String {
    let rows: [(String, Agreement?)] = [
        ("lowering", found.lowering), ("whole prompts", found.scored), ("token by token", found.decoded),
        ("one vs the other", found.paths), ("float kernels", found.exact), ("quantization", found.quantization),
    ]
    let lines = rows.compactMap { name, figures in figures.map { line(name, $0) } }
    let prompts = benchmark.prompts.map {
        String(format: "%d tokens: first token after %.0f ms", $0.tokens, $0.firstTokenMillis.median)
    }
    let speed = String(
        format: "%.1f tokens/s, p95 %.0f ms", benchmark.decodeTokensPerSecond.median, benchmark.tokenP95Millis.median)
    return ([found.verdict.rawValue] + found.failures + lines + prompts + [speed]).joined(separator: "\n")
}

private func line(_ name: String, _ figures: Agreement) -> String {
    name
        + String(
            format: ": %d tokens, top-1 %.1f %%, near ties %d, mean KL %.1e, p99 KL %.1e",
            figures.positions, 100 * figures.top1, figures.nearTies, figures.meanKL, figures.p99KL
        )
}
