import Foundation

/// What a user can set for a chat.
public struct ChatSettings: Codable, Equatable, Sendable {
    public var system = ""  // what the model is told first; blank for nothing
    public var thinking = false
    public var roll = false  // whether a chat forgets its oldest turns when the context is full
    public var sampling: Sampling?  // nil: as the bundle says
    public var seed: Int?  // the same question in the same chat gets the same answer; nil: another one each time
    public var format = AnswerFormat()  // what answers must be
    public var tools = ""  // a JSON list of schemas; blank for none

    public init() {}

    /// Settings saved by an earlier version name no format and no tools.
    public init(from decoder: Decoder) throws {
        let fields = try decoder.container(keyedBy: CodingKeys.self)
        system = try fields.decode(String.self, forKey: .system)
        thinking = try fields.decode(Bool.self, forKey: .thinking)
        roll = try fields.decode(Bool.self, forKey: .roll)
        sampling = try fields.decodeIfPresent(Sampling.self, forKey: .sampling)
        seed = try fields.decodeIfPresent(Int.self, forKey: .seed).flatMap { try parseSeed(String($0)) }
        format = try fields.decodeIfPresent(AnswerFormat.self, forKey: .format) ?? AnswerFormat()
        tools = try fields.decodeIfPresent(String.self, forKey: .tools) ?? ""
    }

    /// Whether the model is given tools: an empty list is none. A text that can't be read counts, until it is replaced.
    public var hasTools: Bool { (try? Tools(tools))?.isEmpty != true }

    /// Why nothing can be asked with these settings; nil if it can.
    public var conflict: String? {
        if !hasTools || format.isAny { return nil }
        return "This chat has tools, and answers in a format call none: tap Any answer in Schema, or No tools in Tools."
    }

    /// How to sample from a bundle: as chosen, else as its authors do, else as Gemma's authors recommend.
    public func sampling(_ manifest: Manifest) throws -> Sampling {
        try sampling ?? manifest.sampling ?? SamplingDraft(nil).sampling()
    }

    /// What chooses the tokens of a bundle's replies.
    public func sampler(_ manifest: Manifest) throws -> Sampler {
        let sampling = try sampling(manifest)
        return seed.map { Sampler(sampling, seed: UInt64($0)) } ?? Sampler(sampling)
    }
}

/// A seed; nil for a blank text. Throws a session error if it is no whole number that fits in 31 bits.
public func parseSeed(_ text: String) throws -> Int? {
    let given = strip(text)
    if given.isEmpty { return nil }
    guard let seed = Int(given), (0...Int(Int32.max)).contains(seed) else {
        throw GemmaError.session("seed is \"\(text.prefix(20))\", expected a whole number from 0 to \(Int32.max), or nothing")
    }
    return seed
}

/// A way of sampling while it is edited.
public struct SamplingDraft: Equatable, Sendable {
    public var temperature: Double
    public var topK: Int
    public var topP: Double
    public var minP: Double
    public var repetitionPenalty: Double

    /// Begins with a way of sampling; nil for the one that Gemma's authors recommend.
    public init(_ sampling: Sampling?) {
        temperature = sampling?.temperature ?? 1
        topK = sampling?.topK ?? 64
        topP = sampling?.topP ?? 0.95
        minP = sampling?.minP ?? 0
        repetitionPenalty = sampling?.repetitionPenalty ?? 1
    }

    /// Throws a session error if a value is out of its range.
    public func sampling() throws -> Sampling {
        try Sampling(
            temperature: temperature, topK: topK, topP: topP, minP: minP, repetitionPenalty: repetitionPenalty)
    }
}

extension Sampling: Codable {
    private enum Names: String, CodingKey {
        case temperature
        case topK = "top_k"
        case topP = "top_p"
        case minP = "min_p"
        case repetitionPenalty = "repetition_penalty"
    }

    public init(from decoder: Decoder) throws {
        let fields = try decoder.container(keyedBy: Names.self)
        try self.init(
            temperature: fields.decode(Double.self, forKey: .temperature),
            topK: fields.decode(Int.self, forKey: .topK),
            topP: fields.decode(Double.self, forKey: .topP),
            minP: fields.decode(Double.self, forKey: .minP),
            repetitionPenalty: fields.decode(Double.self, forKey: .repetitionPenalty)
        )
    }

    public func encode(to encoder: Encoder) throws {
        var fields = encoder.container(keyedBy: Names.self)
        try fields.encode(temperature, forKey: .temperature)
        try fields.encode(topK, forKey: .topK)
        try fields.encode(topP, forKey: .topP)
        try fields.encode(minP, forKey: .minP)
        try fields.encode(repetitionPenalty, forKey: .repetitionPenalty)
    }
}
