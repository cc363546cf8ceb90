import Foundation
import GemmaKit

/// What comes of a question, piece by piece.
enum ChatEvent {
    case piece(String, Latency)
    case ended(StopReason?)
}

/// The one door to the model: whatever touches it waits here for its turn.
actor ModelDoor {
    private var bundle: ModelBundle?
    private var session: Session?
    private var conversation: Conversation?
    private var meter = LatencyMeter()

    /// Checks and loads a bundle; its model's name. Throws GemmaError with a sentence for the user.
    func load(_ directory: URL, onProgress: (Double) -> Void) async throws -> String {
        unload()
        let opened = try ModelBundle.open(directory, onProgress: onProgress)
        if let reason = misfit(opened.manifest, deviceBytes: Double(ProcessInfo.processInfo.physicalMemory)) {
            throw GemmaError.bundle(reason)
        }
        let voice = try Voice(opened)
        meter = LatencyMeter()
        meter.startLoad()
        let loaded = EngineSession(try await openEngine(opened), opened.manifest)
        meter.loaded()
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

    /// The reply to a question. Ending the iteration stops the model between two tokens.
    nonisolated func ask(_ question: String) -> AsyncThrowingStream<ChatEvent, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    try await self.answer(question) { continuation.yield($0) }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    /// Replays the bundle's goldens, measures the loop, and gives both as text and as JSON to share.
    func benchmark(onGolden: (Int, Int) -> Void) async throws -> (summary: String, report: String) {
        guard let bundle, let session else { throw GemmaError.session("no bundle is loaded; pick one in Chat first") }
        let goldens = try loadGoldens(bundle)
        let limits = Limits.of(target: bundle.manifest.target)
        let found = try verify(session, goldens, limits) { onGolden($0, goldens.count) }
        let latency = try await measure(session, bundle.manifest)
        let report = reportJSON(device: describeDevice(), bundle.manifest, found, latency).write()
        return (summary(found, latency), report)
    }

    private func answer(_ question: String, _ say: (ChatEvent) -> Void) async throws {
        guard let conversation else { throw GemmaError.session("no bundle is loaded; tap Bundle and pick one") }
        let reply = try conversation.send(question)
        meter.start()
        for try await piece in reply {
            meter.token()
            say(.piece(piece, meter.latency))
        }
        say(.ended(reply.reason))
    }

    private func measure(_ session: Session, _ manifest: Manifest) async throws -> Latency {
        let length = min(128, session.contextLength / 2)
        let prompt = [manifest.bosToken] + (1..<max(2, length)).map { 200 + $0 }
        session.reset()
        defer { session.reset() }
        let request = GenerationRequest(prompt: prompt, maxNewTokens: 64, stopTokens: [])
        meter.start()
        for try await _ in try TokenGeneration(session, request, Sampler(try Sampling())) { meter.token() }
        return meter.latency
    }
}

/// The backend for a bundle's target.
private func openEngine(_ bundle: ModelBundle) async throws -> Engine {
    switch bundle.manifest.target {
    case "coreml": return try await CoreMLEngine(bundle)
    #if canImport(ExecuTorch)
    case "executorch": return try ExecutorchEngine(bundle)
    #endif
    case let target:
        throw GemmaError.session("the bundle is for \(target), which this app does not run; export with --target coreml")
    }
}

private func describeDevice() -> [String: String] {
    let process = ProcessInfo.processInfo
    return ["system": process.operatingSystemVersionString, "memory_bytes": "\(process.physicalMemory)"]
}

private func summary(_ found: Verification, _ latency: Latency) -> String {
    let rows = [
        ("lowering", found.lowering), ("whole prompts", found.scored), ("token by token", found.decoded),
        ("one vs the other", found.paths), ("quantization", found.quantization),
    ].map { name, figures in
        name
            + String(
                format: ": %d tokens, top-1 %.1f %%, near ties %d, mean KL %.1e, p99 KL %.1e",
                figures.positions, 100 * figures.top1, figures.nearTies, figures.meanKL, figures.p99KL
            )
    }
    let speed = String(
        format: "first token %.0f ms, %.1f tokens/s, p95 %.0f ms",
        latency.firstTokenMillis ?? 0, latency.tokensPerSecond ?? 0, latency.tokenP95Millis ?? 0
    )
    return ([found.verdict.rawValue] + found.failures + rows + [speed]).joined(separator: "\n")
}
