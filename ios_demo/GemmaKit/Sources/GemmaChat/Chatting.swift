import Foundation
import GemmaKit

/// Replies, chats and the benchmark.
extension ChatScreen {
    public func send(_ question: String) {
        startTask { try await self.ask(question, at: self.chat.turns.count) }
    }

    /// Asks another question in the place of one of the user's turns; the turns after it are removed.
    public func edit(_ turn: Turn, _ question: String) {
        guard let place = turn.place else { return }
        startTask { try await self.ask(question, at: place) }
    }

    /// The text of one of the user's turns to edit, without what a schema has added.
    public func question(_ turn: Turn) -> String { request(in: turn.text, settings.format.schema) }

    /// Asks the last question once more, for another reply.
    public func answerAgain() {
        guard let place = lastQuestion(chat.turns) else { return }
        let question = request(in: chat.turns[place].content, settings.format.schema)
        startTask { try await self.ask(question, at: place) }
    }

    /// Whether this is the last reply, which can be given again.
    public func isLastAnswer(_ turn: Turn) -> Bool {
        !turn.isUser && turn.id == turns.last { $0.isReply }?.id && lastQuestion(chat.turns) != nil
    }

    /// Asks in a place of the chat. If no answer begins, the chat is as before, and the question is `unanswered`.
    private func ask(_ question: String, at place: Int) async throws {
        if let conflict = settings.conflict { throw GemmaError.session(conflict) }
        let (shown, format) = (turns, settings.format)
        if let start = turns.firstIndex(where: { $0.place == place }) { turns.removeSubrange(start...) }
        turns.append(Turn(isUser: true, place: place, text: question))
        unanswered = nil
        let hasBegun = try await showAnswer(shown) {
            try await $0.answer(question, at: place, format, $1)
        } else: {
            self.unanswered = question
        }
        if hasBegun && !openCalls.isEmpty { callsAsked += 1 }
    }

    /// The calls of the last reply, which wait for their results.
    public var openCalls: [ToolCall] { GemmaKit.openCalls(chat.turns) }

    /// Gives the model the results of its calls. If no answer begins, the chat is as before.
    public func send(_ results: [JSON]) {
        startTask {
            let hasBegun = try await self.showAnswer(self.turns) { try await $0.answer(results, $1) }
            if hasBegun && !self.openCalls.isEmpty { self.callsAsked += 1 }
        }
    }

    /// Shows an answer and saves the chat; returns whether the answer began. If not, the turns are as before. It may be a chain
    /// of replies: one that never began is not shown, nor the results that it was to answer.
    func showAnswer(
        _ before: [Turn],
        _ answer: @escaping @Sendable (ModelActor, @escaping @Sendable (ChatEvent) -> Void) async throws -> Void,
        else takeBack: () -> Void = {}
    ) async throws -> Bool {
        let model = model
        var (hasBegun, isBegun) = (false, false)  // any reply, the last one
        var kept = before  // the turns without the last reply
        let answered = await resultOf {
            try await self.loadIfNeeded()
            try await self.follow({ try await answer(model, $0) }) { event in
                if event.isBeforeReply && isBegun { (kept, isBegun) = (self.turns, false) }
                isBegun = isBegun || event.isOfBegunReply
                hasBegun = hasBegun || isBegun
                self.show(event)
            }
        }
        if !isBegun { turns = kept }
        if hasBegun { answersEnded += 1 } else { takeBack() }
        try await save()
        try answered.get()
        return hasBegun
    }

    /// Gives this chat tools; a blank text or an empty list gives none. Throws for what are no tools, or those that the bundle
    /// can't be given.
    public func use(tools: String) async throws {
        try await model.check(tools: tools)
        var new = settings
        new.tools = tools
        if !new.hasTools { new.tools = "" }
        try await use(new, computeUnits)
    }

    /// Requires answers to have a format. No token so far depends on it, so nothing is fed again.
    public func use(_ format: AnswerFormat) {
        startTask {
            self.settings.format = format
            try await self.save()
        }
    }

    /// Uses other settings for this chat, from the next reply on, and computes elsewhere, from the next loading on. Throws for
    /// settings that the bundle lacks, which changes nothing.
    public func use(_ new: ChatSettings, _ units: ComputeUnits) async throws {
        try await finish {
            try await self.model.use(new)
            await self.model.use(units)
            (self.settings, self.computeUnits) = (new, units)
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
            self.report = try self.write(benchmark.report)
            self.status = memoryLine()
        }
    }

    /// Decodes for some minutes, and keeps how fast.
    public func sustain(minutes: Double = sustainedMinutes) {
        startTask {
            self.result = nil
            self.spans = []
            try await self.loadIfNeeded()
            let model = self.model
            let sustained = try await self.follow({ try await model.sustain(minutes: minutes, onSpan: $0) }) { (span: Span) in
                self.spans.append(span)
                self.status = String(format: "%.0f of %.0f seconds · ", span.seconds, minutes * 60) + memoryLine()
            }
            self.result = sustained.summary
            self.report = try self.write(sustained.report)
        }
    }

    /// A file to share, named after the bundle. It stays until the next report of this bundle, or until the system clears
    /// the folder.
    private func write(_ report: String) throws -> URL {
        let name = (bundle?.lastPathComponent ?? "report") + ".json"
        let file = FileManager.default.temporaryDirectory.appendingPathComponent(name)
        try Data(report.utf8).write(to: file, options: .atomic)
        return file
    }

    /// Starts a new chat; the old one stays in the list.
    public func reset() {
        go(to: SavedChat(settings: settings))
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
            await self.start(next, else: self.settings)
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
        state.computeUnits = computeUnits
        try store.save(state)
        let now = await model.chat
        let isOther = now.turns != chat.turns || now.forgotten != chat.forgotten
        guard isOther || settings != chat.settings && !now.turns.isEmpty else { return }
        let changed = isOther ? Date() : chat.changed
        chat = SavedChat(id: chat.id, settings: settings, turns: now.turns, forgotten: now.forgotten, changed: changed)
        try store.save(chat)
        chats = store.load()
    }

    /// Goes on with a chat and its settings, or with others if it has none.
    func start(_ saved: SavedChat, else others: ChatSettings) async {
        var next = saved
        next.settings = saved.settings ?? others
        await model.start(next)
        settings = next.settings ?? others
        chat = next
        turns = saved.turns.enumerated().map { place, message in
            switch message.role {
            case .assistant:
                return Turn(isUser: false, isReply: true, text: shownReply(message.content, message.toolCalls))
            case .tool: return Turn(isUser: false, text: shownResult(message))
            default: return Turn(isUser: true, place: place, text: message.content)
            }
        }
    }

    private func show(_ event: ChatEvent) {
        switch event {
        case .forgot(let count): warning = "The context is full: forgot the oldest \(count) turns."
        case .result(let text): turns.append(Turn(isUser: false, text: text))
        case .began: turns.append(Turn(isUser: false, isReply: true, text: ""))
        case .piece(let text, let thought, let progress):
            // There is no such turn if a new chat was started meanwhile.
            if let last = turns.indices.last, !turns[last].isUser {
                turns[last].text += text
                if turns[last].thought != thought { turns[last].thought = thought }
            }
            contextUse = progress.used
            status = statusLine(progress.latency)
        case .ended(let reason, let text, let guarantee):
            if let last = turns.indices.last, turns[last].isReply { turns[last].text = text }
            if reason == .context { warning = "The context is full. Tap New chat to go on." }
            if let guarantee { status = guarantee }
        case .checked(let outcome): turns.append(Turn(isUser: false, text: outcome))
        }
    }
}

public let sustainedMinutes = 10.0

@MainActor
func resultOf<T>(_ work: @MainActor () async throws -> T) async -> Result<T, Error> {
    do { return .success(try await work()) } catch { return .failure(error) }
}

private func statusLine(_ latency: Latency) -> String {
    String(
        format: "%.1f tokens/s · first after %.0f ms · ", latency.tokensPerSecond ?? 0, latency.firstTokenMs ?? 0
    ) + memoryLine()
}
