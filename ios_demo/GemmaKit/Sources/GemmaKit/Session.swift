/// A loaded artifact and its KV caches. It works on token ids, not text. T new tokens, V vocabulary.
public protocol Session: AnyObject {
    /// Tokens in the caches.
    var position: Int { get }

    /// Most tokens the caches can hold.
    var contextLength: Int { get }

    /// Appends tokens in chunks; returns the logits after the last one, (V). Throws contextFull before it writes.
    /// Cancelling the task stops it between two chunks; `position` then counts those that were appended.
    func prefill(_ tokens: [Int]) throws -> [Float]

    /// Appends tokens; returns the logits after each of them, (T, V).
    func score(_ tokens: [Int]) throws -> [[Float]]

    /// Goes back to a position, or to 0 where the caches no longer hold what it needs; returns the position now.
    /// The logits that follow are exactly those of a session that was fed the tokens up to there in the same chunks.
    func rewind(to: Int) throws -> Int

    /// Forgets every token.
    func reset()
}

extension Session {
    /// Appends one token; returns the logits after it, (V).
    public func decode(_ token: Int) throws -> [Float] { try prefill([token]) }
}

/// A backend: runs one chunk of at most `prefill_length` tokens. One session uses it, one call at a time, so a class
/// that conforms may be `@unchecked Sendable`.
public protocol Engine: Sendable {
    /// Whether one call can return the logits of every position, or only of the last.
    var givesEveryRow: Bool { get }

    /// Where the model runs, for reports; nil if the runtime has no choice of it.
    var computeUnits: ComputeUnits? { get }

    /// The runtime and its version, for reports.
    var runtime: String { get }

    /// Appends tokens at a position; returns the logits after the last `rows` of them, (rows, V).
    func run(_ tokens: [Int], position: Int, rows: Int) throws -> [[Float]]
}

extension Engine {
    public var computeUnits: ComputeUnits? { nil }
}

/// A session over an engine: tracks the position, splits chunks, checks arguments. Slots past the position are never read.
public final class EngineSession: Session {
    private let engine: Engine
    private let manifest: Manifest
    public private(set) var position = 0
    private var written = 0  // most tokens that were in the caches since they were empty

    public init(_ engine: Engine, _ manifest: Manifest) {
        self.engine = engine
        self.manifest = manifest
    }

    public var contextLength: Int { manifest.contextLength }

    /// Where the model runs; nil if the runtime has no choice of it.
    public var computeUnits: ComputeUnits? { engine.computeUnits }

    /// The runtime and its version.
    public var runtime: String { engine.runtime }

    public func prefill(_ tokens: [Int]) throws -> [Float] {
        try check(tokens)
        var logits: [Float] = []
        for chunk in chunks(tokens, manifest.prefillLength) { logits = try run(chunk, rows: 1)[0] }
        return logits
    }

    public func score(_ tokens: [Int]) throws -> [[Float]] {
        try check(tokens)
        let pieces = engine.givesEveryRow ? scoredChunks(tokens) : chunks(tokens, 1)
        return try pieces.flatMap { try run($0, rows: $0.count) }
    }

    /// Chunks after which each shared ring still holds what all of their tokens attend to.
    ///
    /// The layer that owns a ring reads it before it drops tokens; one that shares it reads it afterwards. A ring that
    /// has just been filled holds the window of every token since the time before, so chunks end there.
    private func scoredChunks(_ tokens: [Int]) -> [[Int]] {
        let rings = manifest.layers.filter { $0.source != nil && $0.slots < contextLength }
        var pieces: [[Int]] = []
        var start = 0
        while start < tokens.count {
            let room = rings.map { nextFull($0, position + start) - position }.min() ?? tokens.count
            let stop = min(start + manifest.prefillLength, tokens.count, room)
            pieces.append(Array(tokens[start..<stop]))
            start = stop
        }
        return pieces
    }

    /// The next number of tokens, above `total`, that fills all slots of a ring.
    private func nextFull(_ ring: LayerCache, _ total: Int) -> Int {
        if total < ring.slots { return ring.slots }
        return ring.slots + ((total - ring.slots) / ring.ringStep + 1) * ring.ringStep
    }

    public func rewind(to target: Int) throws -> Int {
        guard (0...position).contains(target) else {
            throw GemmaError.session(
                "can't go back to position \(target): \(position) tokens are in the cache; give 0 to \(position)"
            )
        }
        if manifest.layers.allSatisfy({ holds($0, target) }) { position = target } else { reset() }
        return position
    }

    public func reset() {
        position = 0
        written = 0
    }

    /// Whether a cache in which `written` tokens were can go on from a position.
    private func holds(_ cache: LayerCache, _ position: Int) -> Bool {
        guard let window = cache.window else { return true }
        if manifest.target == "onnx" { return firstHeld(cache, position) == firstHeld(cache, written) }
        return written - cache.slots <= max(0, position - window + 1)
    }

    /// The position in slot 0: ONNX Runtime moves a full cache to the front, without its first slots - window + 1 tokens.
    private func firstHeld(_ cache: LayerCache, _ total: Int) -> Int {
        if total <= cache.slots { return 0 }
        return (total - cache.slots + cache.ringStep - 1) / cache.ringStep * cache.ringStep
    }

    private func run(_ chunk: [Int], rows: Int) throws -> [[Float]] {
        try Task.checkCancellation()
        written = max(written, position + chunk.count)
        let logits = try engine.run(chunk, position: position, rows: rows)
        guard logits.count == rows, logits.allSatisfy({ $0.count == manifest.vocabSize }) else {
            throw GemmaError.session(
                "the artifact returned \(logits.count) rows of \(logits.first?.count ?? 0) logits, expected \(rows) of "
                    + "\(manifest.vocabSize); export the model again"
            )
        }
        position += chunk.count
        return logits
    }

    private func check(_ tokens: [Int]) throws {
        guard !tokens.isEmpty else {
            throw GemmaError.session("no tokens given; a prompt needs at least one (the bos token)")
        }
        if let token = tokens.first(where: { !(0..<manifest.vocabSize).contains($0) }) {
            throw GemmaError.session(
                "token \(token) is outside the vocabulary of \(manifest.vocabSize); check the bundle's tokenizer"
            )
        }
        try checkRoom(position, tokens.count, contextLength)
    }
}

/// A session that can unload its graph to run another graph of the bundle, so that two are never in
/// memory at once.
public final class BundleSession: Session {
    private let manifest: Manifest
    private let open: Opener
    private var loaded: EngineSession?

    public typealias Opener = @Sendable (_ graph: String) async throws -> any Engine

    private init(_ manifest: Manifest, _ engine: any Engine, open: @escaping Opener) {
        self.manifest = manifest
        self.open = open
        loaded = EngineSession(engine, manifest)
    }

    /// Opens the shipped graph. Like `withGraph`, this runs where its caller does.
    public static func open(
        _ manifest: Manifest, isolation: isolated (any Actor)? = #isolation, with open: @escaping Opener
    ) async throws -> BundleSession {
        BundleSession(manifest, try await open("decode"), open: open)
    }

    /// Where the model runs; nil if the runtime has no choice of it.
    public var computeUnits: ComputeUnits? { loaded?.computeUnits }

    /// The runtime and its version; nil if the model is no longer in memory.
    public var runtime: String? { loaded?.runtime }

    public var position: Int { loaded?.position ?? 0 }
    public var contextLength: Int { manifest.contextLength }
    public func prefill(_ tokens: [Int]) throws -> [Float] { try session().prefill(tokens) }
    public func score(_ tokens: [Int]) throws -> [[Float]] { try session().score(tokens) }

    public func rewind(to target: Int) throws -> Int { try session().rewind(to: target) }

    public func reset() {
        loaded?.reset()
    }

    /// Runs `work` on another graph, then reloads the shipped one with empty caches.
    public func withGraph<T>(
        _ name: String, isolation: isolated (any Actor)? = #isolation, _ work: (Session) throws -> T
    ) async throws -> T {
        loaded = nil
        let result: Result<T, Error>
        do {
            result = .success(try work(EngineSession(try await open(name), manifest)))
        } catch {
            result = .failure(error)
        }
        loaded = EngineSession(try await open("decode"), manifest)
        return try result.get()
    }

    private func session() throws -> EngineSession {
        guard let loaded else { throw GemmaError.session("the model is no longer in memory; load its bundle again") }
        return loaded
    }
}

/// Throws contextFull if `new` tokens don't fit after the `position` tokens in the cache.
func checkRoom(_ position: Int, _ new: Int, _ contextLength: Int) throws {
    guard position + new <= contextLength else {
        throw GemmaError.contextFull(
            "the cache holds \(position) tokens, and \(new) more would exceed the context of \(contextLength); "
                + "start a new chat, or export with a larger --context"
        )
    }
}

private func chunks(_ tokens: [Int], _ length: Int) -> [[Int]] {
    stride(from: 0, to: tokens.count, by: length).map { Array(tokens[$0..<min($0 + length, tokens.count)]) }
}
