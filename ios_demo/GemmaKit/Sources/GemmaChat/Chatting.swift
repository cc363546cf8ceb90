import Foundation
import GemmaKit

/// Replies, chats and the benchmark.
extension ChatScreen {
    public func send(_ question: String) {
        startTask {
            try await self.loadIfNeeded()
            self.turns.append(Turn(isUser: true, text: question))
            let (model, schema) = (self.model, self.schema)
            let answered = await resultOf {
                try await self.follow({ try await model.answer(question, schema, $0) }, show: self.show)
            }
            try await self.save()
            try answered.get()
        }
    }

    /// Requires answers to match a JSON Schema; an empty text allows any answer.
    public func use(schema text: String) {
        do {
            schema = text.isEmpty ? nil : try Schema(text)
            warning = nil
        } catch {
            warning = message(error)
        }
    }

    /// Uses other settings, from the next reply on.
    public func use(_ new: ChatSettings) {
        startTask {
            try await self.model.use(new)
            self.settings = new
            try await self.save()
        }
    }

    public func benchmark() {
        startTask {
            self.result = nil
            self.report = nil
            try await self.loadIfNeeded()
            let model = self.model
            let benchmark = try await self.follow({ (send: @escaping @Sendable (String) -> Void) in
                try await model.benchmark { send("golden \($0) of \($1)") }
            }) { self.status = $0 }
            self.result = benchmark.summary
            self.report = benchmark.report
            self.status = memoryLine()
        }
    }

    /// Starts a new chat; the old one stays in the list.
    public func reset() {
        go(to: SavedChat())
    }

    /// Goes on with a saved chat.
    public func open(_ saved: SavedChat) {
        go(to: saved)
    }

    public func delete(_ saved: SavedChat) {
        if saved.id == chat.id { reset() }
        replaceTask {
            try self.store.delete(saved.id)
            self.chats = self.store.load()
        }
    }

    private func go(to next: SavedChat) {
        turns = []
        warning = nil
        replaceTask {
            try await self.model.start(next.turns)
            self.chat = next
            self.turns = next.turns.map { Turn(isUser: $0.role == .user, text: $0.content) }
            self.contextUse = await self.model.contextUse
            try await self.save()
        }
    }

    /// Saves what is open, so that nothing is lost if the system ends the app.
    func save() async throws {
        var state = AppState()
        state.bundle = bundle?.lastPathComponent
        state.chat = chat.id
        state.settings = settings
        try store.save(state)
        let turns = await model.turns
        guard turns != chat.turns else { return }
        chat.turns = turns
        chat.changed = Date()
        try store.save(chat)
        chats = store.load()
    }

    private func show(_ event: ChatEvent) {
        switch event {
        case .forgot(let count): warning = "The context is full: forgot the oldest \(count) turns."
        case .began: turns.append(Turn(isUser: false, text: ""))
        case .piece(let text, let thought, let progress):
            // There is no such turn if a new chat was started meanwhile.
            if let last = turns.indices.last, !turns[last].isUser {
                turns[last].text += text
                if turns[last].thought != thought { turns[last].thought = thought }
            }
            contextUse = progress.used
            status = statusLine(progress.latency)
        case .ended(.context): warning = "The context is full. Tap New chat to go on."
        case .ended: break
        case .checked(let outcome): turns.append(Turn(isUser: false, text: outcome))
        }
    }
}

@MainActor
private func resultOf<T>(_ work: @MainActor () async throws -> T) async -> Result<T, Error> {
    do { return .success(try await work()) } catch { return .failure(error) }
}

private func statusLine(_ latency: Latency) -> String {
    String(
        format: "%.1f tokens/s · first after %.0f ms · ", latency.tokensPerSecond ?? 0, latency.firstTokenMs ?? 0
    ) + memoryLine()
}
