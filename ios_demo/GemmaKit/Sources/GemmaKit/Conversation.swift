/// The parts of a bundle that turn messages into tokens and tokens into text.
public struct ChatCodec {
    public let tokenizer: Tokenizer
    public let format: ChatFormat
    public let stopTokens: Set<Int>

    public init(tokenizer: Tokenizer, format: ChatFormat, stopTokens: Set<Int>) {
        self.tokenizer = tokenizer
        self.format = format
        self.stopTokens = stopTokens
    }

    public init(_ bundle: ModelBundle) throws {
        self.init(
            tokenizer: try Tokenizer(bundle),
            format: try ChatFormat(bundle),
            stopTokens: bundle.manifest.stopTokens
        )
    }

    /// Whether the model can be given tools.
    public var canCall: Bool { format.tools != nil }

    /// Throws a tokenizer error if the model can't be given tools, a schema error if its template can't write these.
    public func check(_ tools: Tools) throws { try checkTools(tokenizer, format, tools) }

    /// What ends a reply: also the token with which a model waits for the results of its calls.
    var ends: Set<Int> {
        guard let waits = format.tools?.marks?.waits, let token = tokenizer.token(named: waits) else { return stopTokens }
        return stopTokens.union([token])
    }

    /// The codec with the format that asks for thoughts.
    fileprivate func thinking() throws -> ChatCodec {
        guard let format = format.thinking else {
            throw GemmaError.tokenizer("this bundle's chat template can't ask for thoughts; turn thinking off in Settings")
        }
        return ChatCodec(tokenizer: tokenizer, format: format, stopTokens: stopTokens)
    }
}

/// The model's reply as it is generated: iterate it once; each piece holds whole characters only.
public final class Reply: AsyncSequence, AsyncIteratorProtocol {
    public typealias Element = String

    private let generation: TokenGeneration
    private let codec: ChatCodec
    private let tools: Set<String>  // their names
    private var decoder: StreamDecoder
    private var thoughts: Thoughts
    private var received = ""
    private var answer: [Int] = []  // tokens that are not of a thought
    private var found: FoundCalls?  // once it has ended
    private var ended = false

    /// How many turns were forgotten to make room for this reply.
    public let forgotten: Int

    /// The turns with the results that it answers; none for the reply to a question.
    public let results: [Message]

    init(
        _ generation: TokenGeneration, _ codec: ChatCodec, prompt: [Int], tools: Set<String>, forgotten: Int, results: [Message]
    ) {
        self.generation = generation
        self.codec = codec
        self.tools = tools
        self.forgotten = forgotten
        self.results = results
        decoder = StreamDecoder(codec.tokenizer)
        thoughts = Thoughts(codec.tokenizer, prompt: prompt)
    }

    /// The answer so far, without thoughts; once it has ended, without calls too.
    public var text: String { found?.text ?? received }

    /// The calls of tools that it asks for, once it has ended.
    public var toolCalls: [ToolCall] { found?.calls ?? [] }

    /// What the model has written for itself, before the answer.
    public var thought: String { thoughts.text }

    /// Whether the last token belongs to a thought.
    public var isThinking: Bool { thoughts.isOpen }

    public var tokens: [Int] { generation.tokens }

    /// Whether it counts in the conversation: one that was stopped before its first token leaves no trace.
    public var hasBegun: Bool { !tokens.isEmpty || reason != nil }

    /// Why the reply ended; nil while it is running and after it was stopped.
    public var reason: StopReason? { generation.reason }

    public func makeAsyncIterator() -> Reply { self }

    public func next() async throws -> String? { try await next(isolation: nil) }

    /// One piece of the answer per token, which may be empty; the last one flushes the decoder.
    public func next(isolation actor: isolated (any Actor)?) async throws -> String? {
        if ended { return nil }
        var piece = ""
        if let token = try await generation.next(isolation: actor) {
            piece = decoder.push(token)
            if thoughts.take(token, piece) { return "" }
            answer.append(token)
            received += piece
        } else {
            ended = true
            piece = thoughts.end(decoder.flush())
            received += piece
            readCalls()
        }
        return ended && piece.isEmpty ? nil : piece
    }

    /// Reads the calls. Their tokens may be left out of the text, so a template's are looked for in all that was written.
    private func readCalls() {
        let marks = codec.format.tools?.marks
        let whole = marks == nil ? received : codec.tokenizer.decodeWhole(answer)
        let calls = findCalls(marks?.opens(in: whole) == true ? whole : received, tools, marks)
        if !calls.calls.isEmpty { found = calls }
    }
}

/// The course of a reply.
public enum ReplyEvent: Equatable, Sendable {
    case began
    case piece(String)
    case ended
}

extension Reply {
    /// Generates all of the reply where the caller runs, and tells its course.
    public func run(
        isolation: isolated (any Actor)? = #isolation, onEvent: (Reply, ReplyEvent) -> Void = { _, _ in }
    ) async throws {
        onEvent(self, .began)
        while let piece = try await next(isolation: isolation) { onEvent(self, .piece(piece)) }
        onEvent(self, .ended)
    }
}

/// Turns of user, assistant and tools, of which the model no longer sees the first `forgotten`.
private struct Course {
    var turns: [Message] = []
    var forgotten = 0
}

/// A conversation between a user and the model over one cache. Not thread-safe.
///
/// Each turn feeds only the tokens that the cache lacks. If the format changes an earlier reply (it may trim
/// it, and leaves out thoughts), or the user goes on from an earlier turn, the session goes back to what the two have
/// in common. Where it can't, because a cache no longer holds what it needs, the conversation is fed again.
///
/// With `roll`, a full context makes it forget the oldest turns, a question with its reply at a time, but never
/// the system turn. The next reply is then that of a new conversation that begins with the turns kept.
///
/// With `tools`, a reply has the calls that it asks for; `send(results:)` gives the model what they returned. A thought before
/// calls is kept until the user's next turn.
public final class Conversation {
    private let session: Session
    private let codec: ChatCodec
    private let sampler: Sampler
    private let thinking: Bool
    private let tools: Tools
    private let opening: [Message]  // the system turn, if there is one
    public var roll: Bool
    private var before = Course()  // without the last question, which counts once it has a reply
    private var asked = Course()
    private var fed: [Int] = []
    private var reply: Reply?

    /// A conversation that goes on after `turns` of user and assistant, the first `forgotten` of which the model doesn't
    /// see. With `thinking`, the model thinks before it answers, also before an answer that a grammar holds; throws a
    /// tokenizer error if the bundle's chat template has no thinking to turn on, or this model can't be given tools, and a
    /// schema error if its template can't write these.
    public init(
        _ session: Session, _ codec: ChatCodec, _ sampler: Sampler, system: String? = nil, roll: Bool = false,
        thinking: Bool = false, turns: [Message] = [], forgotten: Int = 0, tools: Tools = .none
    ) throws {
        self.session = session
        self.tools = tools
        self.codec = thinking ? try codec.thinking() : codec
        self.sampler = sampler
        self.thinking = thinking
        self.roll = roll
        opening = system.map { [Message(.system, $0)] } ?? []
        try self.codec.check(tools)
        reset()
        before = Course(turns: turns, forgotten: forgotten)
    }

    /// Forgets every turn except the system's.
    public func reset() {
        before = Course()
        fed = []
        reply = nil
        session.reset()
    }

    /// The names of the tools that the model was given.
    var toolNames: Set<String> { tools.names }

    /// What has been said so far.
    private var course: Course {
        guard let reply, reply.hasBegun else { return before }
        let calls = reply.toolCalls
        let said = Message(.assistant, reply.text, toolCalls: calls, thought: calls.isEmpty ? "" : reply.thought)
        return Course(turns: asked.turns + [said], forgotten: asked.forgotten)
    }

    /// The turns of user, assistant and tools, also those that the model has forgotten. A stopped reply counts with the text
    /// it has; a question without any reply leaves no trace.
    public var turns: [Message] { course.turns }

    /// How many of the first turns the model no longer sees.
    public var forgotten: Int { course.forgotten }

    /// What the model sees: the system turn, if there is one, and the turns that it has not forgotten.
    public var messages: [Message] { seen(course) }

    /// The reply to `content`. If the conversation no longer fits, throws contextFull and changes nothing.
    /// With `roll`, only a turn that doesn't fit by itself does so. A grammar holds this reply alone to its format.
    public func send(_ content: String, maxNewTokens: Int? = nil, grammar: ByteGrammar? = nil) throws -> Reply {
        try send(content, at: course.turns.count, maxNewTokens: maxNewTokens, grammar: grammar)
    }

    /// As `send`, with `content` in the place of the turn at `index`, which must be the user's; the turns after it are
    /// gone once this reply begins. The same content draws another reply. A place among forgotten turns brings back
    /// those before it, as far as they fit.
    public func send(
        _ content: String, at index: Int, maxNewTokens: Int? = nil, grammar: ByteGrammar? = nil
    ) throws -> Reply {
        let now = course
        try checkPlace(now.turns, index)
        let whole = Course(
            turns: now.turns.prefix(index) + [Message(.user, content)],
            forgotten: index < now.forgotten ? 0 : now.forgotten)
        return try reply(to: whole, maxNewTokens, grammar)
    }

    /// The reply to the results of the calls in the last turn, in their order. Throws a session error if it has other calls.
    public func send(results: [JSON], maxNewTokens: Int? = nil) throws -> Reply {
        var whole = course
        let calls = whole.turns.last?.toolCalls ?? []
        guard !calls.isEmpty, calls.count == results.count else {
            throw GemmaError.session(
                "the last reply calls \(calls.count) tools, but there are \(results.count) results; give one for each call")
        }
        whole.turns += zip(calls, results).map(resultTurn)
        return try reply(to: whole, maxNewTokens, nil)
    }

    private func reply(to whole: Course, _ maxNewTokens: Int?, _ grammar: ByteGrammar?) throws -> Reply {
        let now = course
        let (next, tokens) = try fitting(whole, maxNewTokens ?? session.contextLength)
        try checkFits(tokens)
        let cached = try keepBeginning(tokens)
        let request = GenerationRequest(
            prompt: Array(tokens[cached...]),
            history: Array(tokens[..<cached]),
            maxNewTokens: maxNewTokens ?? session.contextLength,
            stopTokens: codec.ends,
            grammar: grammar.map { GrammarState($0, codec.tokenizer, stopTokens: codec.ends, thinking: thinking) }
        )
        let generation = try TokenGeneration(session, request, sampler.forReply())
        let results = next.turns.suffix(from: (next.turns.lastIndex { $0.role != .tool } ?? -1) + 1)
        let answer = Reply(
            generation, codec, prompt: tokens, tools: tools.names, forgotten: next.forgotten - whole.forgotten,
            results: Array(results))
        (before, asked, fed, reply) = (now, next, tokens, answer)
        return answer
    }

    private func seen(_ course: Course) -> [Message] { opening + course.turns.dropFirst(course.forgotten) }

    /// The turns to feed and their tokens; with `roll`, without the oldest if there is no room. A quarter of the
    /// context is kept free for the reply, or all of the reply if that is less.
    private func fitting(_ whole: Course, _ maxNewTokens: Int) throws -> (Course, [Int]) {
        let room = session.contextLength - min(maxNewTokens, session.contextLength / 4)
        var next = whole
        while true {
            let tokens = try encodeChat(codec.tokenizer, codec.format, seen(next), tools: tools)
            let question = next.turns.indices.dropFirst(next.forgotten + 1).first { next.turns[$0].role == .user }
            guard roll, tokens.count > room, let question else { return (next, tokens) }
            next.forgotten = question
        }
    }

    /// Goes back to what the cache and `tokens` have in common at the beginning; returns how many tokens that are.
    private func keepBeginning(_ tokens: [Int]) throws -> Int {
        let cached = fed + (reply?.tokens ?? [])
        if session.position > cached.count { return try session.rewind(to: 0) }  // not all of it is this conversation's
        let count = min(session.position, tokens.count - 1)
        return try session.rewind(to: (0..<count).first { cached[$0] != tokens[$0] } ?? count)
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

private func checkPlace(_ turns: [Message], _ index: Int) throws {
    guard index == turns.count || turns.indices.contains(index) && turns[index].role == .user else {
        throw GemmaError.session(
            "turn \(index) is not the user's, of \(turns.count) turns; give one of the user's, or \(turns.count)")
    }
}
