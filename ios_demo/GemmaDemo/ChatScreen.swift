import Foundation
import GemmaKit
import Observation
import os

/// What the screens show, and the one task that may run.
@MainActor @Observable
final class ChatScreen {
    struct Turn: Identifiable {
        let id = UUID()
        let mine: Bool
        var text: String
    }

    private(set) var turns: [Turn] = []
    private(set) var status = "Tap Bundle to load a model."
    private(set) var warning: String?
    private(set) var result: String?
    private(set) var report: String?
    private(set) var busy = false
    private var task: Task<Void, Never>?
    private let door = ModelDoor()

    /// Folders with a manifest in the app's Documents.
    func bundles() -> [URL] {
        let found = try? FileManager.default.contentsOfDirectory(at: .documentsDirectory, includingPropertiesForKeys: nil)
        return (found ?? [])
            .filter { FileManager.default.fileExists(atPath: $0.appendingPathComponent("manifest.json").path) }
            .sorted { $0.lastPathComponent < $1.lastPathComponent }
    }

    func load(_ directory: URL) {
        begin {
            self.turns = []
            self.status = "Checking \(directory.lastPathComponent) …"
            let model = try await self.door.load(directory) { share in
                Task { @MainActor in self.status = String(format: "Checking: %.0f %%", 100 * share) }
            }
            self.status = model
        }
    }

    func send(_ question: String) {
        begin {
            self.turns += [Turn(mine: true, text: question), Turn(mine: false, text: "")]
            let place = self.turns.count - 1
            for try await event in self.door.ask(question) {
                switch event {
                case .piece(let text, let latency):
                    self.turns[place].text += text
                    self.status = statusLine(latency)
                case .ended(.context): self.warning = "The context is full. Tap New chat to go on."
                case .ended: break
                }
            }
        }
    }

    func benchmark() {
        begin {
            self.result = nil
            self.report = nil
            let found = try await self.door.benchmark { done, all in
                Task { @MainActor in self.status = "golden \(done) of \(all)" }
            }
            self.result = found.summary
            self.report = found.report
        }
    }

    func stop() {
        task?.cancel()
    }

    func reset() {
        stop()
        turns = []
        warning = nil
        let running = task
        Task {
            await running?.value
            await door.reset()
        }
    }

    /// The system is short of memory: the model goes before the app does.
    func unload() {
        stop()
        turns = []
        warning = "Memory is short, so the model was unloaded. Tap Bundle to load it again."
        let running = task
        Task {
            await running?.value
            await door.unload()
        }
    }

    private func begin(_ work: @escaping @MainActor () async throws -> Void) {
        guard !busy else { return }
        busy = true
        warning = nil
        task = Task {
            do {
                try await work()
            } catch let error as GemmaError {
                warning = error.message
            } catch is CancellationError {
                status = "Stopped."
            } catch {
                warning = error.localizedDescription
            }
            busy = false
        }
    }
}

private func statusLine(_ latency: Latency) -> String {
    String(
        format: "%.1f tokens/s · first after %.0f ms · %.0f MB free",
        latency.tokensPerSecond ?? 0, latency.firstTokenMillis ?? 0, Double(os_proc_available_memory()) / 1e6
    )
}
