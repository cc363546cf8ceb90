/// The parts of a bundle that turn messages into tokens and tokens into text.
public struct ChatCodec {
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

/// The model's reply as it is generated: iterate it once; each piece holds whole characters only.
public final class Reply: AsyncSequence, AsyncIteratorProtocol {
    public typealias Element = String

    private let generation: TokenGeneration
    private var decoder: StreamDecoder
    private var ended = false

    /// The text so far.
    public private(set) var text = ""

    init(_ generation: TokenGeneration, _ tokenizer: Tokenizer) {
        self.generation = generation
        decoder = StreamDecoder(tokenizer)
    }

    public var tokens: [Int] { generation.tokens }

    /// Why the reply ended; nil while it is running and after it was stopped.
    public var reason: StopReason? { generation.reason }

    public func makeAsyncIterator() -> Reply { self }

    /// One piece per token, which may be empty; the last one flushes the decoder.
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

/// A conversation between a user and the model over one cache. Not thread-safe.
///
/// Each turn feeds only the tokens that the cache lacks. If the format changes an earlier reply (it may trim
/// it), the cached tokens no longer match; then the cache is emptied and the conversation is fed again.
public final class Conversation {
    private let session: Session
    private let codec: ChatCodec
    private let sampler: Sampler
    private let system: String?
    private var turns: [Message] = []
    private var fed: [Int] = []
    private var reply: Reply?

    public init(_ session: Session, _ codec: ChatCodec, _ sampler: Sampler, system: String? = nil) {
        self.session = session
        self.codec = codec
        self.sampler = sampler
        self.system = system
        reset()
    }

    /// Forgets every turn except the system's.
    public func reset() {
        turns = system.map { [Message(.system, $0)] } ?? []
        fed = []
        reply = nil
        session.reset()
    }

    /// The turns so far. A stopped reply counts with the text it has; a question without any reply is left out.
    public var messages: [Message] {
        guard let reply else { return turns }
        if reply.tokens.isEmpty && reply.reason == nil { return turns.dropLast() }
        return turns + [Message(.assistant, reply.text)]
    }

    /// The reply to `content`. If the conversation no longer fits, throws contextFull and changes nothing.
    public func send(_ content: String, maxNewTokens: Int? = nil) throws -> Reply {
        let messages = messages + [Message(.user, content)]
        let tokens = try encodeChat(codec.tokenizer, codec.format, messages, bosToken: codec.bosToken)
        try checkFits(tokens)
        let cached = usableCache(tokens)
        let request = GenerationRequest(
            prompt: Array(tokens[cached...]),
            history: Array(tokens[..<cached]),
            maxNewTokens: maxNewTokens ?? session.contextLength,
            stopTokens: codec.stopTokens
        )
        let next = Reply(try TokenGeneration(session, request, sampler), codec.tokenizer)
        turns = messages
        fed = tokens
        reply = next
        return next
    }

    /// How many leading tokens are cached already; resets the session if the cache doesn't match them.
    private func usableCache(_ tokens: [Int]) -> Int {
        let cached = fed + (reply?.tokens ?? [])
        let count = session.position
        if count < tokens.count, count <= cached.count, cached[..<count] == tokens[..<count] { return count }
        session.reset()
        return 0
    }

    private func checkFits(_ tokens: [Int]) throws {
        guard tokens.count <= session.contextLength else {
            throw GemmaError.contextFull(
                "the conversation has \(tokens.count) tokens, the context holds \(session.contextLength); "
                    + "start a new chat, shorten the message, or export with a larger --context"
            )
        }
    }
}
