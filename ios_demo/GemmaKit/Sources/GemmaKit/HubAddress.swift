import Foundation

/// A bundle on the Hugging Face hub: `hub:OWNER/NAME[@REVISION]` or its repository's page, as `gemma-runtime` takes it.
public struct HubAddress: Equatable, Sendable, CustomStringConvertible {
    public let repository: String
    public let revision: String?

    /// Throws a download error for a text that is no such address.
    public init(_ text: String) throws {
        let trimmed = text.trimmingCharacters(in: .whitespacesAndNewlines)
        let given = trimmed.hasPrefix("hub:") ? String(trimmed.dropFirst(4)) : trimmed
        let parts = given.split(separator: "@", maxSplits: 1, omittingEmptySubsequences: false).map(String.init)
        let address = matches(parts[0], host) ? page(parts[0]) : (parts[0], nil)
        guard let address, isRepository(address.repository) else {
            throw GemmaError.download(
                "\"\(trimmed.prefix(100))\" is not a hub address; expected hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
        }
        let named = parts.count > 1 && !parts[1].isEmpty ? parts[1] : address.revision
        self.init(repository: address.repository, revision: named)
    }

    init(repository: String, revision: String?) {
        self.repository = repository
        self.revision = revision
    }

    /// The repository's name without its owner.
    public var name: String { String(repository.drop { $0 != "/" }.dropFirst()) }

    public var description: String { "hub:\(repository)" + (revision.map { "@\($0)" } ?? "") }

    /// Where a file is at a branch, tag or commit.
    func url(_ origin: String, at revision: String, _ file: String) -> URL? {
        let path = file.split(separator: "/", omittingEmptySubsequences: false).map { escaped(String($0)) }
        return URL(string: "\(origin)/\(repository)/resolve/\(escaped(revision))/\(path.joined(separator: "/"))")
    }
}

public let hub = "https://huggingface.co"

private let host = #"\A(https?://)?(www\.)?(huggingface\.co|hf\.co)/"#
private let unescaped = CharacterSet(charactersIn: "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")

private func matches(_ text: String, _ pattern: String) -> Bool {
    text.range(of: pattern, options: [.regularExpression, .caseInsensitive]) != nil
}

private func page(_ text: String) -> (repository: String, revision: String?)? {
    guard let found = text.range(of: host, options: [.regularExpression, .caseInsensitive]) else { return nil }
    let whole = text[found.upperBound...].prefix { $0 != "?" && $0 != "#" }.trimmingCharacters(in: ["/"])
    let path = whole.split(separator: "/", omittingEmptySubsequences: false).map(String.init)
    guard path.count >= 2, path[0] != "datasets", path[0] != "spaces" else { return nil }
    let rest = path.dropFirst(2).map { $0 }
    let isReference = rest.count == 4 && rest[1] == "refs"  // refs/pr/1
    guard rest.isEmpty || rest[0] == "tree" && (rest.count == 2 || isReference) else { return nil }
    guard let revision = rest.dropFirst().joined(separator: "/").removingPercentEncoding else { return nil }
    return ("\(path[0])/\(path[1])", revision.isEmpty ? nil : revision)
}

private func isRepository(_ text: String) -> Bool {
    matches(text, #"\A[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*\z"#) && text.utf8.allSatisfy { $0 < 128 }
        && ![".gguf", ".safetensors", ".json", ".bin", ".pt"].contains { text.hasSuffix($0) }
        && !text.contains("--") && !text.contains("..")
}

private func escaped(_ part: String) -> String { part.addingPercentEncoding(withAllowedCharacters: unescaped) ?? "" }
