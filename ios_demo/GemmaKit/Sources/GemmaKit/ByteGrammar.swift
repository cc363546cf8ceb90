/// Follows a text byte by byte through a grammar that `gemma-runtime compile-schema` wrote.
///
/// `byte_grammar.py` of the runtime describes the format; this is the same code. A state is a number. What may follow
/// a byte is again a grammar, the derivative; equal grammars get the same number, so each is made once. Throws a schema
/// error, also while it follows, for a grammar that would take too much memory or too deep a stack.
public final class ByteGrammar {
    static let nothing = 0  // no text at all
    static let end = 1  // the empty text

    private var nodes: [Node] = [.alt([]), .bytes([])]  // the second is never looked at
    private var endings = [false, true]
    private var depths = [1, 1]  // of the calls that a derivative takes
    private var work = 0
    private var numbers: [Node: Int] = [:]
    private var derivatives: [Int: Int] = [:]

    /// The state before the first byte.
    private(set) var start = nothing

    /// Throws a JSON error if the text is not JSON, a schema error if it is not a grammar.
    public convenience init(_ text: String) throws { try self.init(parseJSON(text)) }

    init(_ json: JSON) throws {
        guard case .object(let fields) = json, case .array(let written)? = fields["nodes"] else {
            throw wrong("it has no nodes")
        }
        var read: [Int] = []
        for node in written { read.append(try number(of: node, after: read)) }
        guard let first = whole(fields["start"]), read.indices.contains(first) else { throw wrong("it has no start") }
        start = read[first]
    }

    /// The state behind a byte; `nothing` if the byte may not come next.
    func after(_ state: Int, _ byte: UInt8) throws -> Int {
        let key = state << 8 | Int(byte)
        if let known = derivatives[key] { return known }
        let derivative = try derive(state, byte)
        if derivatives.count >= mostDerivatives { derivatives = [:] }
        derivatives[key] = derivative
        return derivative
    }

    /// The state behind some bytes; `nothing` if they may not come next.
    func follow(_ state: Int, _ text: some Sequence<UInt8>) throws -> Int {
        var now = state
        for byte in text {
            if now == Self.nothing { break }
            now = try after(now, byte)
        }
        return now
    }

    /// Whether the text may end here.
    func mayEnd(_ state: Int) -> Bool { endings[state] }

    private func derive(_ state: Int, _ byte: UInt8) throws -> Int {
        if state <= Self.end { return Self.nothing }
        switch nodes[state] {
        case .bytes(let ranges): return ranges.contains { $0.contains(byte) } ? Self.end : Self.nothing
        case .seq(let first, let rest):
            let behind = try sequence(after(first, byte), rest)
            return mayEnd(first) ? try choice([behind, after(rest, byte)]) : behind
        case .alt(let cases): return try choice(cases.map { try after($0, byte) })
        case .repeated(let body, let least, let most):
            let left = try repeated(body, max(least - 1, 0), most.map { $0 - 1 })
            return try sequence(after(body, byte), left)
        }
    }

    /// Nested to the right, so that equal sequences get the same number.
    private func sequence(_ first: Int, _ rest: Int) throws -> Int {
        var firsts: [Int] = []
        var last = first
        while case .seq(let one, let others) = nodes[last] {
            firsts.append(one)
            last = others
        }
        try spend(firsts.count)
        return try firsts.reversed().reduce(pair(last, rest)) { try pair($1, $0) }
    }

    private func pair(_ first: Int, _ rest: Int) throws -> Int {
        if first == Self.nothing || rest == Self.nothing { return Self.nothing }
        if first == Self.end || rest == Self.end { return max(first, rest) }
        return try number(.seq(first, rest), mayEnd(first) && mayEnd(rest))
    }

    private func choice(_ cases: [Int]) throws -> Int {
        var flat: Set<Int> = []
        for one in cases {
            guard case .alt(let inner) = nodes[one] else {
                try spend(1)
                flat.insert(one)
                continue
            }
            try spend(inner.count)
            flat.formUnion(inner)
        }
        if let only = flat.first, flat.count == 1 { return only }
        return try number(.alt(flat.sorted()), flat.contains(where: mayEnd))
    }

    private func repeated(_ body: Int, _ least: Int, _ most: Int?) throws -> Int {
        if most == 0 || body == Self.end { return Self.end }
        if body == Self.nothing { return least == 0 ? Self.end : Self.nothing }
        return try number(.repeated(body, least, most), least == 0 || mayEnd(body))
    }

    private func number(_ node: Node, _ mayEnd: Bool) throws -> Int {
        if node == .alt([]) { return Self.nothing }
        if let known = numbers[node] { return known }
        try spend(1 + node.parts.count)
        let depth = 1 + (calls(of: node).map { depths[$0] }.max() ?? 0)
        if depth > deepest { throw tooLarge }
        numbers[node] = nodes.count
        nodes.append(node)
        endings.append(mayEnd)
        depths.append(depth)
        return nodes.count - 1
    }

    private func spend(_ steps: Int) throws {
        work += steps
        if work > mostWork { throw tooLarge }
    }

    /// The parts whose derivatives that of a node is made of.
    private func calls(of node: Node) -> [Int] {
        if case .seq(let first, _) = node, !mayEnd(first) { return [first] }
        return node.parts
    }
}

/// Reading a grammar: nodes as they are written, each made of earlier ones.
extension ByteGrammar {
    private func number(of json: JSON, after earlier: [Int]) throws -> Int {
        let refusal = wrong("its node \(earlier.count) is \(json.write().prefix(40))")
        guard case .array(let parts) = json, case .string(let kind)? = parts.first else { throw refusal }
        func node(_ json: JSON) throws -> Int {
            guard let index = whole(json), earlier.indices.contains(index) else { throw refusal }
            return earlier[index]
        }
        switch kind {
        case "bytes":
            guard parts.count == 2, let ranges = byteRanges(parts[1]) else { throw refusal }
            return try number(.bytes(ranges), false)
        case "text":
            guard parts.count == 2, case .string(let text) = parts[1] else { throw refusal }
            return try text.utf8.reversed().reduce(Self.end) { try pair(number(.bytes([$1...$1]), false), $0) }
        case "seq": return try parts.dropFirst().reversed().reduce(Self.end) { try sequence(node($1), $0) }
        case "alt": return try choice(parts.dropFirst().map(node))
        case "repeat":
            guard parts.count == 4, let least = whole(parts[2]) else { throw refusal }
            let most = whole(parts[3])
            guard most.map({ $0 >= least }) ?? (parts[3] == .null) else { throw refusal }
            return try repeated(node(parts[1]), least, most)
        default: throw refusal
        }
    }
}

private enum Node: Hashable {
    case bytes([ClosedRange<UInt8>])
    case seq(Int, Int)
    case alt([Int])
    case repeated(Int, Int, Int?)

    var parts: [Int] {
        switch self {
        case .bytes: []
        case .seq(let first, let rest): [first, rest]
        case .alt(let cases): cases
        case .repeated(let body, _, _): [body]
        }
    }
}

private func byteRanges(_ json: JSON) -> [ClosedRange<UInt8>]? {
    guard case .array(let items) = json, !items.isEmpty else { return nil }
    var ranges: [ClosedRange<UInt8>] = []
    for item in items {
        guard case .array(let ends) = item, ends.count == 2, let low = whole(ends[0]), let high = whole(ends[1]),
            low <= high, high <= 255
        else { return nil }
        ranges.append(UInt8(low)...UInt8(high))
    }
    return ranges
}

/// A whole number of at least 0 that fits in 32 bits.
private func whole(_ json: JSON?) -> Int? {
    guard case .number(let value, _)? = json, value == value.rounded(), (0...Double(Int32.max)).contains(value) else {
        return nil
    }
    return Int(value)
}

private let mostWork = 1_000_000  // parts of nodes, and steps to make them: some 50 MB
private let mostDerivatives = 300_000  // the memory of so many is freed, and they are made again
private let deepest = 256  // fits in the stack of a thread
private let tooLarge = GemmaError.schema("the grammar is too large to follow; compile a smaller schema")

private func wrong(_ what: String) -> GemmaError {
    .schema("the grammar is not valid: \(what); run gemma-runtime compile-schema again")
}

/// Where a reply stands in its grammar. With `thinking` it may begin with a thought, which the grammar doesn't hold.
public final class GrammarState {
    private let grammar: ByteGrammar
    private let tokenizer: Tokenizer
    private let stopTokens: Set<Int>
    private let opens: Int?
    private let closes: Int?
    private var mayThink: Bool
    private var isThinking = false
    private var state: Int

    public init(_ grammar: ByteGrammar, _ tokenizer: Tokenizer, stopTokens: Set<Int>, thinking: Bool = false) {
        self.grammar = grammar
        self.tokenizer = tokenizer
        self.stopTokens = stopTokens
        opens = tokenizer.token(named: thoughtOpens)
        closes = tokenizer.token(named: thoughtCloses)
        mayThink = thinking && opens != nil && closes != nil
        state = grammar.start
    }

    /// Whether the reply is complete and nothing may follow.
    var isDone: Bool { !isThinking && state == ByteGrammar.end }

    /// Whether a token may come next: text that the grammar allows, or a stop token where the reply may end. A thought
    /// may have any but stop tokens.
    func allows(_ token: Int) throws -> Bool {
        if isThinking { return !stopTokens.contains(token) }
        if mayThink && token == opens { return true }
        return stopTokens.contains(token) ? grammar.mayEnd(state) : try after(token) != ByteGrammar.nothing
    }

    func accept(_ token: Int) throws {
        if isThinking {
            isThinking = token != closes
        } else if mayThink && token == opens {
            isThinking = true
        } else {
            state = try after(token)
        }
        mayThink = false
    }

    private func after(_ token: Int) throws -> Int {
        if let byte = tokenizer.byte(of: token) { return try grammar.after(state, byte) }
        let text = tokenizer.text(of: token)
        return text.isEmpty ? ByteGrammar.nothing : try grammar.follow(state, text.utf8)
    }
}
