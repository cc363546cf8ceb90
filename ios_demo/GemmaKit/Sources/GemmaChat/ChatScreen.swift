import Foundation
import GemmaKit
import Observation

/// The state of the screens, and the only task that may run at a time.
@MainActor @Observable
public final class ChatScreen {
    public struct Turn: Identifiable {
        public let id = UUID()
        public let isUser: Bool
        public internal(set) var text: String
    }

    public private(set) var turns: [Turn] = []
    public private(set) var status = "Tap Bundle to load a model."
    public private(set) var warning: String?
    public private(set) var result: String?
    public private(set) var report: String?
    public private(set) var schema: Schema?
    /// Whether a chat forgets its oldest turns when the context is full.
    public var roll = false
    private var task: Task<Void, Never>?
    private var running = 0  // tasks that have not ended, cancelled ones included
    private let model: ModelActor

    /// Tests pass their own engine.
    public init(open: @escaping EngineOpener = openEngine) {
        model = ModelActor(open: open)
    }

    public var busy: Bool { running > 0 }

    /// The folders in the app's Documents that contain a manifest.
    public func bundles() -> [URL] {
        FileManager.default.urls(for: .documentDirectory, in: .userDomainMask)
            .flatMap { (try? FileManager.default.contentsOfDirectory(at: $0, includingPropertiesForKeys: nil)) ?? [] }
            .filter { FileManager.default.fileExists(atPath: $0.appendingPathComponent("manifest.json").path) }
            .sorted { $0.lastPathComponent < $1.lastPathComponent }
    }

    public func load(_ directory: URL) {
        startTask {
            self.turns = []
            self.status = "Checking \(directory.lastPathComponent) …"
            let name = try await self.model.load(directory) { share in
                Task { @MainActor in self.status = String(format: "Checking: %.0f %%", 100 * share) }
            }
            self.status = "\(name) · \(memoryLine())"
        }
    }

    public func send(_ question: String) {
        startTask {
            self.turns.append(Turn(isUser: true, text: question))
            let (events, feed) = AsyncStream.makeStream(of: ChatEvent.self)
            // A child task: cancelled with this task, and finished before this task finishes.
            async let answered: Void = self.answer(question, feed)
            for await event in events { self.show(event) }
            try await answered
        }
    }

    /// Requires answers to match a JSON Schema; an empty text allows any answer.
    public func use(schema text: String) {
        do {
            schema = text.isEmpty ? nil : try Schema(text)
            warning = nil
        } catch let error as GemmaError {
            warning = error.message
        } catch {
            warning = error.localizedDescription
        }
    }

    public func benchmark() {
        startTask {
            self.result = nil
            self.report = nil
            let benchmark = try await self.model.benchmark { done, all in
                Task { @MainActor in self.status = "golden \(done) of \(all)" }
            }
            self.result = benchmark.summary
            self.report = benchmark.report
            self.status = memoryLine()
        }
    }

    public func stop() {
        task?.cancel()
    }

    public func reset() {
        turns = []
        warning = nil
        replaceTask { await self.model.reset() }
    }

    /// Frees the model when memory is low, so that the system doesn't end the app.
    public func unload() {
        turns = []
        warning = "Memory is low, so the model was unloaded. Tap Bundle to load it again."
        replaceTask { await self.model.unload() }
    }

    private func answer(_ question: String, _ feed: AsyncStream<ChatEvent>.Continuation) async throws {
        defer { feed.finish() }
        try await model.answer(question, schema, roll: roll) { feed.yield($0) }
    }

    private func show(_ event: ChatEvent) {
        switch event {
        case .forgot(let count): warning = "The context is full: forgot the oldest \(count) turns."
        case .began: turns.append(Turn(isUser: false, text: ""))
        case .piece(let text, let latency):
            // There is no such turn if a new chat was started meanwhile.
            if let last = turns.indices.last, !turns[last].isUser { turns[last].text += text }
            status = statusLine(latency)
        case .ended(.context): warning = "The context is full. Tap New chat to go on."
        case .ended: break
        case .checked(let outcome): turns.append(Turn(isUser: false, text: outcome))
        }
    }

    private func startTask(_ work: @escaping @MainActor () async throws -> Void) {
        guard !busy else { return }
        warning = nil
        running += 1
        task = Task {
            defer { running -= 1 }
            do {
                try await work()
            } catch let error as GemmaError {
                warning = error.message
            } catch is CancellationError {
                status = "Stopped."
            } catch {
                warning = error.localizedDescription
            }
        }
    }

    /// Cancels the running task, waits until it has ended, then runs `work`; no other task starts meanwhile.
    private func replaceTask(_ work: @escaping @MainActor () async -> Void) {
        let before = task
        before?.cancel()
        running += 1
        task = Task {
            defer { running -= 1 }
            await before?.value
            await work()
        }
    }
}

private func statusLine(_ latency: Latency) -> String {
    String(
        format: "%.1f tokens/s · first after %.0f ms · ", latency.tokensPerSecond ?? 0, latency.firstTokenMs ?? 0
    ) + memoryLine()
}
