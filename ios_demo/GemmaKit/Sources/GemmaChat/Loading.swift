import Foundation
import GemmaKit

/// Bundles: loading, adding and deleting them.
extension ChatScreen {
    /// Goes on where the app was left: the same bundle, chat and settings.
    public func resume() {
        startTask {
            try self.library.prepare()
            self.library.clean()
            self.bundles = self.library.bundles()
            self.chats = self.store.load()
            let state = self.store.loadState()
            self.computeUnits = state.computeUnits
            await self.model.use(state.computeUnits)
            let saved = self.chats.first { $0.id == state.chat } ?? self.chat
            await self.start(saved, else: state.settings)
            guard let bundle = state.bundle.flatMap(self.library.bundle(named:)) else { return }
            try await self.load(bundle)
        }
    }

    /// Loads a bundle; the chat goes on with it.
    public func choose(_ bundle: URL) {
        startTask {
            try await self.load(bundle)
            try await self.save()
        }
    }

    /// Copies a bundle from a folder or a zip file, and loads it. Calls `onEnd` when the source is no longer needed.
    public func add(from source: URL, onEnd: @escaping () -> Void = {}) {
        guard !busy else { return onEnd() }
        startTask {
            defer { onEnd() }
            let model = self.model
            let bundle = try await self.follow({ try await model.add(from: source, onPhase: $0) }) {
                self.status = text($0, source)
            }
            self.bundles = self.library.bundles()
            try await self.load(bundle)
            try await self.save()
        }
    }

    /// Deletes a bundle; if it is loaded, unloads it first.
    public func delete(_ bundle: URL) {
        startTask {
            if bundle == self.bundle {
                await self.model.unload()
                self.bundle = nil
                self.contextUse = nil
                self.status = "Tap Bundles to load a model."
            }
            try self.library.delete(bundle)
            self.bundles = self.library.bundles()
            try await self.save()
        }
    }

    /// Looks for bundles that were copied with the Files app.
    public func findBundles() {
        bundles = library.bundles()
        downloads = library.unfinished()
    }

    func loadIfNeeded() async throws {
        if let bundle, await !model.isLoaded { try await load(bundle) }
    }

    func load(_ bundle: URL) async throws {
        let model = model
        self.bundle = bundle
        contextUse = nil
        status = "Checking \(bundle.lastPathComponent) …"
        let name = try await follow(
            { try await model.load(bundle, onPhase: $0) }, show: { self.status = text($0, bundle) })
        contextUse = await model.contextUse
        let seconds = await model.loading.map { String(format: "loaded in %.1f s · ", $0.loadMs / 1000) } ?? ""
        status = "\(name) · \(seconds)\(memoryLine())"
    }
}

private func text(_ phase: LoadPhase, _ bundle: URL) -> String {
    switch phase {
    case .copying(let share): return String(format: "Copying %@: %.0f %%", bundle.lastPathComponent, 100 * share)
    case .checking(let share): return String(format: "Checking: %.0f %%", 100 * share)
    case .opening(let compiles): return compiles ? "Loading … the first time, the model is compiled." : "Loading …"
    }
}
