import Foundation
import GemmaKit
import Observation

/// The state of the screens, and the only task that may run at a time.
@MainActor @Observable
public final class ChatScreen {
    public struct Turn: Identifiable {
        public let id = UUID()
        public let isUser: Bool
        public internal(set) var isReply = false  // the model's, and not about a reply
        public internal(set) var place: Int?  // a question's, among the turns of the saved chat
        public internal(set) var text: String
        public internal(set) var thought = ""  // what the model wrote for itself before the answer
    }

    public internal(set) var turns: [Turn] = []
    /// How many answers have ended, for announcements to those who don't see them.
    public internal(set) var answersEnded = 0
    /// How many answers have ended with calls whose results the user is to give.
    public internal(set) var callsAsked = 0
    /// A question that got no answer, for the user to change.
    public internal(set) var unanswered: String?
    public internal(set) var status = "Tap Bundles to load a model."
    public internal(set) var warning: String?
    public internal(set) var result: String?
    public internal(set) var report: URL?  // a .json file to share
    public internal(set) var spans: [Span] = []  // of the last sustained benchmark
    /// The bundle that is or will be loaded.
    public internal(set) var bundle: URL?
    /// The bundles on this device.
    public internal(set) var bundles: [URL] = []
    /// Downloads that have not ended.
    public internal(set) var downloads: [UnfinishedDownload] = []
    /// Of the open chat.
    public internal(set) var settings = ChatSettings()
    /// Where to compute, from the next time that a bundle is loaded.
    public internal(set) var computeUnits = ComputeUnits.automatic
    /// Saved chats, the last changed first.
    public internal(set) var chats: [SavedChat] = []
    public internal(set) var contextUse: ContextUse?

    let model: ModelActor
    let library: BundleLibrary
    let store: ChatStore
    var chat = SavedChat()
    /// Tests download from elsewhere than the hub.
    @ObservationIgnored var makeDownload = { HubDownload($0, isMeteredAllowed: $1) }
    private let freeBytes: () -> Double
    private var task: Task<Void, Never>?
    private var running = 0  // tasks that have not ended, cancelled ones included
    private var wasMemoryLow = false  // since the running task started

    /// Tests pass their own folders and engine. An app with ExecuTorch passes `openWithExecutorch`.
    public init(
        library: BundleLibrary = appLibrary, store: ChatStore = appStore, open: @escaping EngineOpener = openEngine,
        freeBytes: @escaping () -> Double = availableBytes
    ) {
        self.library = library
        self.store = store
        self.freeBytes = freeBytes
        model = ModelActor(library: library, open: open)
    }

    public var busy: Bool { running > 0 }

    public func stop() {
        task?.cancel()
    }

    /// Unloads the model if memory is really low and nothing is running, so that the system doesn't end the app. The
    /// chat stays; the next message loads the model again.
    public func memoryWarning() {
        if busy { wasMemoryLow = true } else { unloadIfLow() }
    }

    private func unloadIfLow() {
        wasMemoryLow = false
        guard freeBytes() < lowBytes, let bundle else { return }
        replaceTask {
            await self.model.unload()
            self.contextUse = nil
            self.status = "\(bundle.lastPathComponent) was unloaded, because memory is low. The next message loads it again."
        }
    }

    /// Runs work unless other work is running.
    func startTask(_ work: @escaping @MainActor () async throws -> Void) {
        guard !busy else { return }
        warning = nil
        run(work)
    }

    /// Runs work and waits for its end. Throws what it throws, or a session error if other work is running.
    func finish(_ work: @escaping @MainActor () async throws -> Void) async throws {
        if busy { throw GemmaError.session("the model is busy; wait for it, or tap Stop") }
        try await withCheckedThrowingContinuation { (ended: CheckedContinuation<Void, Error>) in
            startTask { ended.resume(with: await resultOf(work)) }
        }
    }

    /// Cancels the running task, waits until it has ended, then runs `work`; no other task starts meanwhile.
    func replaceTask(_ work: @escaping @MainActor () async throws -> Void) {
        let before = task
        before?.cancel()
        run {
            await before?.value
            try await work()
        }
    }

    private func run(_ work: @escaping @MainActor () async throws -> Void) {
        running += 1
        task = Task {
            do {
                try await work()
            } catch is CancellationError {
                status = "Stopped."
            } catch {
                warning = message(error)
            }
            running -= 1
            if wasMemoryLow && !busy { unloadIfLow() }
        }
    }

    /// Runs work in a child task, which is cancelled with this task and has ended when this returns, and shows all of
    /// its events in their order.
    func follow<Event: Sendable, Result: Sendable>(
        _ work: @escaping @Sendable (@escaping @Sendable (Event) -> Void) async throws -> Result,
        show: (Event) -> Void
    ) async throws -> Result {
        let (events, feed) = AsyncStream.makeStream(of: Event.self)
        let late = Late<Event>()
        async let result = finishing(feed, late, work)
        for await event in events { show(event) }
        defer { late.events.forEach(show) }
        return try await result
    }
}

private let lowBytes = 150e6

@Sendable
private func finishing<Event: Sendable, Result: Sendable>(
    _ feed: AsyncStream<Event>.Continuation,
    _ late: Late<Event>,
    _ work: @Sendable (@escaping @Sendable (Event) -> Void) async throws -> Result
) async throws -> Result {
    defer { feed.finish() }
    return try await work { event in
        if case .terminated = feed.yield(event) { late.add(event) }
    }
}

/// Events that come after a cancelled task's stream has ended, until the work sees that it is cancelled too.
private final class Late<Event: Sendable>: @unchecked Sendable {
    private let lock = NSLock()
    private var all: [Event] = []

    var events: [Event] { lock.withLock { all } }

    func add(_ event: Event) { lock.withLock { all.append(event) } }
}

func message(_ error: Error) -> String { (error as? GemmaError)?.message ?? error.localizedDescription }

/// The app's bundles, in its Documents, which the Files app shows.
public let appLibrary = BundleLibrary(
    folder: FileManager.default.urls(for: .documentDirectory, in: .userDomainMask)[0], support: support)
public let appStore = ChatStore(support)

private let support = FileManager.default.urls(for: .applicationSupportDirectory, in: .userDomainMask)[0]
