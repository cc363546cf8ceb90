/// What of a bundle a conversation needs.
public struct Voice {
    public let tokenizer: Tokenizer
    public let format: ChatFormat
    public let bosToken: Int
    public let stopTokens: Set<Int>

    public init(tokenizer: Tokenizer, format: ChatFormat, bosToken: Int, stopTokens: Set<Int>) {
        self.tokenizer = tokenizer
        self.format = format
        self.bosToken = bosToken
        self.stopTokens = stopTokens
    }

    public init(_ bundle: ModelBundle) throws {
        self.init(
            tokenizer: try Tokenizer(bundle),
            format: try ChatFormat(bundle),
            bosToken: bundle.manifest.bosToken,
            stopTokens: bundle.manifest.stopTokens
        )
    }
}

/// The model's answer under way: iterate it once, for whole characters as they come.
public final class Reply: AsyncSequence, AsyncIteratorProtocol {
    public typealias Element = String

    private let generation: TokenGeneration
    private var decoder: StreamDecoder
    private var ended = false

    /// What was said so far.
    public private(set) var text = ""

    init(_ generation: TokenGeneration, _ tokenizer: Tokenizer) {
        self.generation = generation
        decoder = StreamDecoder(tokenizer)
    }

    public var tokens: [Int] { generation.tokens }

    /// Why it ended; nil while it has not, and when it was stopped.
    public var reason: StopReason? { generation.reason }

    public func makeAsyncIterator() -> Reply { self }

    /// A piece for each token, also an empty one; at the end what was left.
    public func next() async throws -> String? {
        if ended { return nil }
        var piece = ""
        if let token = try await generation.next() {
            piece = decoder.push(token)
        } else {
            ended = true
            piece = decoder.flush()
        }
        text += piece
        return ended && piece.isEmpty ? nil : piece
    }
}

/// Turns between a user and the model, sharing one cache. Not for several threads at once.
///
/// Each turn feeds only what the cache lacks. When the format writes an earlier turn otherwise than the
/// model did (it trims the reply, say), the cache is emptied and fed anew.
public final class Conversation {
    private let session: Session
    private let voice: Voice
    private let sampler: Sampler
    private let system: String?
    private var turns: [Message] = []
    private var fed: [Int] = []
    private var reply: Reply?

    public init(_ session: Session, _ voice: Voice, _ sampler: Sampler, system: String? = nil) {
        self.session = session
        self.voice = voice
        self.sampler = sampler
        self.system = system
        reset()
    }

    /// Forgets every turn but the system's.
    public func reset() {
        turns = system.map { [Message(.system, $0)] } ?? []
        fed = []
        reply = nil
        session.reset()
    }

    /// The turns so far. A reply that was stopped counts as far as it came; one that never began, not at all.
    public var messages: [Message] {
        guard let reply else { return turns }
        if reply.tokens.isEmpty && reply.reason == nil { return turns.dropLast() }
        return turns + [Message(.assistant, reply.text)]
    }

    /// The reply to `content`. Throws contextFull, and stays as it was, if the conversation no longer fits.
    public func send(_ content: String, maxNewTokens: Int? = nil) throws -> Reply {
        let messages = messages + [Message(.user, content)]
        let tokens = try encodeChat(voice.tokenizer, voice.format, messages, bosToken: voice.bosToken)
        try checkFits(tokens)
        let cached = usableCache(tokens)
        let request = GenerationRequest(
            prompt: Array(tokens[cached...]),
            history: Array(tokens[..<cached]),
            maxNewTokens: maxNewTokens ?? session.contextLength,
            stopTokens: voice.stopTokens
        )
        let next = Reply(try TokenGeneration(session, request, sampler), voice.tokenizer)
        turns = messages
        fed = tokens
        reply = next
        return next
    }

    /// Tokens of the cache that begin the conversation; the session is emptied where it holds others.
    private func usableCache(_ tokens: [Int]) -> Int {
        let held = fed + (reply?.tokens ?? [])
        let count = session.position
        if count < tokens.count, count <= held.count, held[..<count] == tokens[..<count] { return count }
        session.reset()
        return 0
    }

    private func checkFits(_ tokens: [Int]) throws {
        guard tokens.count <= session.contextLength else {
            throw GemmaError.contextFull(
                "the conversation has \(tokens.count) tokens, the context holds \(session.contextLength); "
                    + "start a new chat, say less, or export with a larger --context"
            )
        }
    }
}
