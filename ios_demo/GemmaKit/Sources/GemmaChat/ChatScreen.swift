import Foundation
import GemmaKit
import Observation

/// What the screens show, and the one task that may run.
@MainActor @Observable
public final class ChatScreen {
    public struct Turn: Identifiable {
        public let id = UUID()
        public let mine: Bool
        public internal(set) var text: String
    }

    public private(set) var turns: [Turn] = []
    public private(set) var status = "Tap Bundle to load a model."
    public private(set) var warning: String?
    public private(set) var result: String?
    public private(set) var report: String?
    public private(set) var schema: Schema?
    private var task: Task<Void, Never>?
    private var running = 0  // tasks that have not ended, those that are cancelled included
    private let door: ModelDoor

    /// With another opener of engines in tests.
    public init(open: @escaping EngineOpener = openEngine) {
        door = ModelDoor(open: open)
    }

    public var busy: Bool { running > 0 }

    /// Folders with a manifest in the app's Documents.
    public func bundles() -> [URL] {
        FileManager.default.urls(for: .documentDirectory, in: .userDomainMask)
            .flatMap { (try? FileManager.default.contentsOfDirectory(at: $0, includingPropertiesForKeys: nil)) ?? [] }
            .filter { FileManager.default.fileExists(atPath: $0.appendingPathComponent("manifest.json").path) }
            .sorted { $0.lastPathComponent < $1.lastPathComponent }
    }

    public func load(_ directory: URL) {
        begin {
            self.turns = []
            self.status = "Checking \(directory.lastPathComponent) …"
            let model = try await self.door.load(directory) { share in
                Task { @MainActor in self.status = String(format: "Checking: %.0f %%", 100 * share) }
            }
            self.status = "\(model) · \(memoryLine())"
        }
    }

    public func send(_ question: String) {
        begin {
            self.turns.append(Turn(mine: true, text: question))
            let (events, feed) = AsyncStream.makeStream(of: ChatEvent.self)
            // A child of this task: it is cancelled with it, and has ended when this has.
            async let answered: Void = self.answer(question, feed)
            for await event in events { self.show(event) }
            try await answered
        }
    }

    /// Makes answers match a JSON Schema; an empty text lets them be anything.
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
        begin {
            self.result = nil
            self.report = nil
            let found = try await self.door.benchmark { done, all in
                Task { @MainActor in self.status = "golden \(done) of \(all)" }
            }
            self.result = found.summary
            self.report = found.report
            self.status = memoryLine()
        }
    }

    public func stop() {
        task?.cancel()
    }

    public func reset() {
        turns = []
        warning = nil
        interrupt { await self.door.reset() }
    }

    /// The system is short of memory: the model goes before the app does.
    public func unload() {
        turns = []
        warning = "Memory is short, so the model was unloaded. Tap Bundle to load it again."
        interrupt { await self.door.unload() }
    }

    private func answer(_ question: String, _ feed: AsyncStream<ChatEvent>.Continuation) async throws {
        defer { feed.finish() }
        try await door.answer(question, schema) { feed.yield($0) }
    }

    private func show(_ event: ChatEvent) {
        switch event {
        case .began: turns.append(Turn(mine: false, text: ""))
        case .piece(let text, let latency):
            // None where a new chat began meanwhile.
            if let last = turns.indices.last, !turns[last].mine { turns[last].text += text }
            status = statusLine(latency)
        case .ended(.context): warning = "The context is full. Tap New chat to go on."
        case .ended: break
        case .checked(let outcome): turns.append(Turn(mine: false, text: outcome))
        }
    }

    private func begin(_ work: @escaping @MainActor () async throws -> Void) {
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

    /// Ends what runs, waits until the model is free, then works; nothing else begins meanwhile.
    private func interrupt(_ work: @escaping @MainActor () async -> Void) {
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
        format: "%.1f tokens/s · first after %.0f ms · ", latency.tokensPerSecond ?? 0, latency.firstTokenMillis ?? 0
    ) + memoryLine()
}
