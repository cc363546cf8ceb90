public enum StopReason: Equatable, Sendable {
    case stopToken, length, context
    case constraint  // the grammar allows nothing more
}

/// A prompt and when to stop generating.
public struct GenerationRequest {
    public let prompt: [Int]  // tokens to feed
    public let history: [Int]  // tokens that are cached already; only the repetition penalty uses them
    public let maxNewTokens: Int
    public let stopTokens: Set<Int>
    public let grammar: GrammarState?  // what the reply must be

    public init(
        prompt: [Int], history: [Int] = [], maxNewTokens: Int, stopTokens: Set<Int>, grammar: GrammarState? = nil
    ) {
        self.prompt = prompt
        self.history = history
        self.maxNewTokens = maxNewTokens
        self.stopTokens = stopTokens
        self.grammar = grammar
    }
}

/// Generates tokens: iterate it once. Cancelling the task stops it between two tokens.
public final class TokenGeneration: AsyncSequence, AsyncIteratorProtocol {
    public typealias Element = Int

    private let session: Session
    private let request: GenerationRequest
    private let sampler: Sampler
    private var previous: [Int]

    /// The new tokens so far, without the stop token.
    public private(set) var tokens: [Int] = []

    /// Why it ended; nil while it is running and after it was cancelled.
    public private(set) var reason: StopReason?

    /// Throws contextFull, before anything is written, if the prompt doesn't fit.
    public init(_ session: Session, _ request: GenerationRequest, _ sampler: Sampler) throws {
        try checkRoom(session.position, request.prompt.count, session.contextLength)
        guard request.maxNewTokens >= 1 else {
            throw GemmaError.session("max_new_tokens is \(request.maxNewTokens), expected at least 1")
        }
        self.session = session
        self.request = request
        self.sampler = sampler
        previous = request.history + request.prompt
    }

    public func makeAsyncIterator() -> TokenGeneration { self }

    public func next() async throws -> Int? { try await next(isolation: nil) }

    public func next(isolation actor: isolated (any Actor)?) async throws -> Int? {
        guard reason == nil else { return nil }
        try Task.checkCancellation()
        let logits = try tokens.last.map(session.decode) ?? session.prefill(request.prompt)
        try Task.checkCancellation()
        let token = try sampler.pick(logits, previous: previous, allowed: request.grammar?.allows)
        if request.stopTokens.contains(token) {
            reason = .stopToken
            return nil
        }
        try request.grammar?.accept(token)
        tokens.append(token)
        previous.append(token)
        if request.grammar?.isDone == true {
            reason = .constraint
        } else if tokens.count == request.maxNewTokens {
            reason = .length
        } else if session.position == session.contextLength {
            reason = .context
        }
        return token
    }
}
