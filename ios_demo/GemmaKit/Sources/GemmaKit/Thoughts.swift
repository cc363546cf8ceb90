let thoughtOpens = "<|channel>"
let thoughtCloses = "<channel|>"

/// Tells a reply's thoughts from its answer: Gemma 4 writes them in a channel before it, and its chat template removes
/// them from earlier turns. As in `gemma_runtime/text/thoughts.py`.
///
///     <|channel>thought
///     …<channel|>the answer
struct Thoughts {
    private let open: Int?
    private let close: Int?
    private var written = ""
    private(set) var isOpen = false

    /// A prompt may have begun the channel already, as after the results of tools.
    init(_ tokenizer: Tokenizer, prompt: [Int] = []) {
        open = tokenizer.token(named: thoughtOpens)
        close = tokenizer.token(named: thoughtCloses)
        if let at = prompt.lastIndex(where: { $0 == open || $0 == close }), prompt[at] == open {
            isOpen = true
            written = tokenizer.decode(Array(prompt[(at + 1)...]))
        }
    }

    /// Whether a token belongs to a thought; `text` is what it completes.
    mutating func take(_ token: Int, _ text: String) -> Bool {
        if token == open {
            isOpen = true
            return true
        }
        guard isOpen else { return false }
        isOpen = token != close
        written += isOpen || !text.hasSuffix(thoughtCloses) ? text : String(text.dropLast(thoughtCloses.count))
        return true
    }

    /// What of the text's end, which no token completed, is not a thought's.
    mutating func end(_ rest: String) -> String {
        guard isOpen else { return rest }
        written += rest
        return ""
    }

    /// The thoughts, without the channel's name, which is the first line.
    var text: String {
        let scalars = written.unicodeScalars
        guard let end = scalars.firstIndex(of: "\n") else { return "" }
        return strip(String(scalars[scalars.index(after: end)...]))
    }
}
