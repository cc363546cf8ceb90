import Foundation
import GemmaKit

/// The events of an answer, in order.
enum ChatEvent: Sendable {
    case result(String)  // of a call, as a message, before the reply to it
    case forgot(Int)  // this many turns were forgotten, because the context was full
    case began  // a reply begins; with a schema there may be several
    case piece(String, thought: String, Progress)  // of the answer; the thought is whole
    case ended(StopReason?, text: String, guarantee: String?)  // all of it; whether it has its format, as a message
    case checked(String)  // the outcome of the check against the schema, as a message

    /// Whether the reply that it belongs to counts in the conversation.
    var isOfBegunReply: Bool {
        switch self {
        case .piece: true
        case .ended(let reason, _, _): reason != nil
        default: false
        }
    }

    /// Whether it comes before the first token of a reply.
    var isBeforeReply: Bool {
        switch self {
        case .result, .began: true
        default: false
        }
    }
}

/// Figures while a reply is generated.
struct Progress: Sendable {
    let latency: Latency
    let used: ContextUse
}

/// How many tokens of the context are taken.
public struct ContextUse: Equatable, Sendable {
    public let tokens: Int
    public let limit: Int
}

/// What loading is busy with.
enum LoadPhase: Sendable {
    case copying(Double)  // share of all bytes
    case checking(Double)
    case opening(compiles: Bool)
}

/// What was measured of the bundle in memory.
private struct Results {
    var verification: Verification?
    var benchmark: Benchmark?
    var sustained: Sustained?
}

/// A bundle in memory.
private struct Loaded {
    let bundle: ModelBundle
    let session: BundleSession
    let codec: ChatCodec
    let times: Loading
}

/// Owns the model; all access to it goes through this actor. While a call is awaited the actor can be
/// entered again, so callers must wait for one call before they start the next. `ChatScreen` does.
///
/// The chat is kept while no model is in memory.
actor ModelActor {
    private let library: BundleLibrary
    private let open: EngineOpener
    nonisolated let thread = OwnThread("gemma.model")
    private var loaded: Loaded?
    private var conversation: Conversation?
    private var kept = SavedChat()
    private var computeUnits = ComputeUnits.automatic
    private var meter = LatencyMeter()
    private var results = Results()

    init(library: BundleLibrary, open: @escaping EngineOpener) {
        self.library = library
        self.open = open
    }

    /// Runs of the model block their thread, some of them until work in Swift's pool has ended.
    nonisolated var unownedExecutor: UnownedSerialExecutor { thread.asUnownedSerialExecutor() }

    var isLoaded: Bool { loaded != nil }

    /// Copies a bundle from a folder or a zip file into the library.
    func add(from source: URL, onPhase: @escaping @Sendable (LoadPhase) -> Void) throws -> URL {
        try library.add(from: source) { onPhase(.copying($0)) }
    }

    /// Checks and loads a bundle; returns its model's name. Throws GemmaError with a message for the user.
    func load(_ directory: URL, onPhase: @Sendable (LoadPhase) -> Void) async throws -> String {
        unload()
        var check = LatencyMeter()
        check.startLoad()
        let bundle = try library.open(directory) { onPhase(.checking($0)) }
        check.loaded()
        if let reason = memoryProblem(bundle.manifest, availableBytes: availableBytes()) {
            throw GemmaError.bundle(reason)
        }
        onPhase(.opening(compiles: ["coreml", "coreai"].contains(bundle.manifest.target)))
        let codec = try ChatCodec(bundle)
        var load = LatencyMeter()
        load.startLoad()
        let units = computeUnits
        let session = try await BundleSession.open(bundle.manifest) { [open] in try await open(bundle, $0, units) }
        load.loaded()
        let times = Loading(checkMs: check.latency.loadMs ?? 0, loadMs: load.latency.loadMs ?? 0)
        let new = Loaded(bundle: bundle, session: session, codec: codec, times: times)
        loaded = new
        return bundle.manifest.modelID
    }

    /// Frees the model; the conversation goes on when it is loaded again.
    func unload() {
        kept = chat
        (loaded, conversation) = (nil, nil)
        results = Results()
    }

    /// The chat so far. A stopped reply counts with the text it has.
    var chat: SavedChat {
        guard let conversation else { return kept }
        return SavedChat(
            id: kept.id, settings: kept.settings, turns: conversation.turns, forgotten: conversation.forgotten,
            changed: kept.changed)
    }

    /// How long checking and loading took; nil if no model is in memory.
    var loading: Loading? { loaded?.times }

    /// How much of the context is taken; nil if no model is in memory.
    var contextUse: ContextUse? {
        loaded.map { ContextUse(tokens: $0.session.position, limit: $0.session.contextLength) }
    }

    /// Goes on with a chat, from the next reply on.
    func start(_ chat: SavedChat) {
        kept = chat
        conversation = nil
        loaded?.session.reset()
    }

    /// Uses other settings from the next reply on; throws if the bundle doesn't support one, which changes nothing.
    func use(_ new: ChatSettings) throws {
        var next = chat
        next.settings = new
        guard let loaded else { return start(next) }
        let made = try makeConversation(loaded, next)
        (kept, conversation) = (next, made)
    }

    /// Computes there from the next loading on.
    func use(_ units: ComputeUnits) { computeUnits = units }

    /// Answers a question in a place of the chat, in a format. Cancelling the task stops it between two tokens, and between two
    /// chunks of the prompt.
    func answer(_ question: String, at place: Int, _ format: AnswerFormat, _ send: @Sendable (ChatEvent) -> Void) async throws {
        guard let loaded else { throw GemmaError.session("no bundle is loaded; tap Bundles and pick one") }
        let conversation = try conversation ?? makeConversation(loaded, kept)
        self.conversation = conversation
        let outcome = try await askFormatted(conversation, question, format, at: place) { tell($0, $1, format, send) }
        if let outcome { send(.checked(outcome)) }
        try await answerBuiltIn(conversation, onEvent: { tell($0, $1, format, send) })
    }

    /// Answers the results of the last reply's calls.
    func answer(_ results: [JSON], _ send: @Sendable (ChatEvent) -> Void) async throws {
        guard let loaded else { throw GemmaError.session("no bundle is loaded; tap Bundles and pick one") }
        let conversation = try conversation ?? makeConversation(loaded, kept)
        self.conversation = conversation
        try await conversation.send(results: results).run { tell($0, $1, AnswerFormat(), send) }
        try await answerBuiltIn(conversation, onEvent: { tell($0, $1, AnswerFormat(), send) })
    }

    /// Throws a schema error for what are no tools, or for those that the bundle can't write, and a tokenizer error if it can't
    /// be given any.
    func check(tools text: String) throws {
        let tools = try Tools(text)
        try loaded?.codec.check(tools)
    }

    /// Verifies the bundle against its goldens and measures its speed; returns both as text and as JSON to share.
    func benchmark(onGolden: @Sendable (Int, Int) -> Void) async throws -> (summary: String, report: String) {
        guard let loaded else { throw GemmaError.session("no bundle is loaded; pick one in Chat first") }
        let (bundle, manifest) = (loaded.bundle, loaded.bundle.manifest)
        let before = await describeCondition("start")
        let verification = try await verifyBundle(bundle, loaded.session, onGolden: onGolden)
        let workload = Workload(contextLength: manifest.contextLength)
        let benchmark = try measureSpeed(loaded.session, vocabSize: manifest.vocabSize, workload)
        (results.verification, results.benchmark) = (verification, benchmark)
        return (summary(verification, loaded.times, benchmark), try await report(loaded, before))
    }

    /// Decodes for some minutes; returns the figures as text, and all that was measured as JSON to share.
    func sustain(minutes: Double, onSpan: @escaping @Sendable (Span) -> Void) async throws -> (
        summary: String, report: String
    ) {
        guard let loaded else { throw GemmaError.session("no bundle is loaded; pick one in Chat first") }
        let manifest = loaded.bundle.manifest
        let before = await describeCondition("start")
        let sustained = try measureSustained(
            loaded.session, vocabSize: manifest.vocabSize, Workload(contextLength: manifest.contextLength), minutes: minutes,
            condition: conditionNow, onSpan: onSpan)
        results.sustained = sustained
        let text = String(
            format: "first %.1f, last %.1f, lowest %.1f tokens/s", sustained.first, sustained.last, sustained.lowest)
        return (text, try await report(loaded, before))
    }

    /// All results of the bundle in memory.
    private func report(_ loaded: Loaded, _ before: [String: String]) async throws -> String {
        let condition = before.merging(await describeCondition("end")) { $1 }
        var device = describeDevice().merging(condition) { $1 }
        device["compute_units"] = loaded.session.computeUnits?.rawValue  // as loaded, whatever was chosen since
        device["runtime"] = loaded.session.runtime
        return try reportJSON(
            device: device, loaded.bundle, results.verification, loaded.times, results.benchmark, results.sustained
        ).write()
    }

    private func makeConversation(_ loaded: Loaded, _ chat: SavedChat) throws -> Conversation {
        let settings = chat.settings ?? ChatSettings()
        return try Conversation(
            loaded.session, loaded.codec, settings.sampler(loaded.bundle.manifest),
            system: strip(settings.system).isEmpty ? nil : settings.system, roll: settings.roll,
            thinking: settings.thinking, turns: chat.turns, forgotten: chat.forgotten, tools: Tools(settings.tools))
    }

    private func tell(_ reply: Reply, _ event: ReplyEvent, _ format: AnswerFormat, _ send: @Sendable (ChatEvent) -> Void) {
        switch event {
        case .began:
            for result in reply.results { send(.result(shownResult(result))) }
            if reply.forgotten > 0 { send(.forgot(reply.forgotten)) }
            send(.began)
            meter.start()
        case .piece(let piece):
            meter.token()
            let used = contextUse ?? ContextUse(tokens: 0, limit: 0)
            send(.piece(piece, thought: reply.thought, Progress(latency: meter.latency, used: used)))
        case .ended:
            let text = shownReply(reply.text, reply.toolCalls)
            send(.ended(reply.reason, text: text, guarantee: guarantee(format, reply)))
        }
    }
}

private func summary(_ verification: Verification, _ times: Loading, _ benchmark: Benchmark) -> String {
    let rows: [(String, Agreement?)] = [
        ("lowering", verification.lowering),
        ("whole prompts", verification.scored),
        ("token by token", verification.decoded),
        ("decoded vs scored", verification.paths),
        ("float kernels", verification.exact),
        ("quantization", verification.quantization),
    ]
    let lines = rows.compactMap { name, figures in figures.map { line(name, $0) } }
    let prompts = benchmark.prompts.map(line)
    let load = String(format: "load %.0f ms, after checking for %.0f ms", times.loadMs, times.checkMs)
    let speed = String(
        format: "%.1f tokens/s, p95 %.0f ms", benchmark.decodeTokensPerSecond.median, benchmark.tokenP95Ms.median)
    let build = isDebug ? ["This is a debug build, which is slower. Run the Release build for figures."] : []
    let verdict = [verification.verdict.rawValue] + verification.failures
    return [verdict, lines, [load], prompts, [speed], build].joined().joined(separator: "\n")
}

private func line(_ figures: PromptFigures) -> String {
    let decode = figures.decodeTokensPerSecond.map { String(format: ", then %.1f tokens/s", $0.median) } ?? ""
    return String(
        format: "%d tokens: first after %.0f ms, prefill %.1f tokens/s", figures.tokens, figures.firstTokenMs.median,
        figures.tokensPerSecond.median) + decode
}

private func line(_ name: String, _ figures: Agreement) -> String {
    name
        + String(
            format: ": %d tokens, top-1 %.1f %%, near ties %d, mean KL %.1e, p99 KL %.1e",
            figures.positions, 100 * figures.top1, figures.nearTies, figures.meanKL, figures.p99KL
        )
}
