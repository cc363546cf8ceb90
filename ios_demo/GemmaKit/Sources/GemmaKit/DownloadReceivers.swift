import Foundation

/// Takes a manifest into memory.
final class ManifestReceiver: Receiver, @unchecked Sendable {
    private(set) var data = Data()
    private(set) var commit: String?
    private let address: HubAddress

    init(_ address: HubAddress) {
        self.address = address
    }

    func begin(_ answer: HTTPAnswer) throws {
        try refuse(answer, answer.status == 404 ? "\(address), or its manifest.json," : "\(address)")
        commit = answer.commit
    }

    func take(_ piece: Data) throws {
        data += piece
        guard data.count <= manifestLimit else {
            throw GemmaError.download("the manifest of \(address) has more than \(manifestLimit) bytes; it is not a bundle")
        }
    }
}

/// Appends a file to its part, or starts the part again if the answer is the whole file.
final class FileReceiver: Receiver, @unchecked Sendable {
    private let name: String
    private let file: BundleFile
    private let stage: DownloadStage
    private let known: PartialFile?
    private let attempt: Attempt
    private let told: @Sendable (Int) -> Void
    private var digest: Digest
    private var length = 0
    private var host = ""
    private var out: FileHandle?

    init(
        _ name: String, _ file: BundleFile, _ stage: DownloadStage, _ known: PartialFile?, _ digest: Digest,
        _ attempt: Attempt, _ told: @escaping @Sendable (Int) -> Void
    ) {
        self.name = name
        self.file = file
        self.stage = stage
        self.known = known
        self.digest = digest
        self.attempt = attempt
        self.told = told
    }

    deinit { try? out?.close() }

    func begin(_ answer: HTTPAnswer) throws {
        host = answer.host
        if answer.status == 416 {
            stage.dropPart()
            throw CutError(reason: "\(host) doesn't go on with \(name)")
        }
        try refuse(answer, name)
        if answer.status == 206 {
            try checkRange(answer)
        } else {
            digest = Digest()
            try stage.startPart(file, answer.etag)
        }
        length = stage.partBytes
        if let bytes = answer.bytes, length + bytes != file.bytes { throw wrongSize("\(length + bytes)") }
        if length == 0 { try Data().write(to: stage.part) }
        out = try FileHandle(forWritingTo: stage.part)
        try out?.seekToEnd()
    }

    func take(_ data: Data) throws {
        length += data.count
        guard length <= file.bytes else { throw wrongSize("more") }
        do {
            try out?.write(contentsOf: data)
        } catch {
            throw GemmaError.download("the download can't be kept: \(error.localizedDescription); free some storage")
        }
        digest.update(data)
        attempt.hasProgressed = true
        told(length)
    }

    /// The whole file's digest; throws CutError if not all of it has arrived.
    func finish() throws -> String {
        try out?.close()
        out = nil
        guard length == file.bytes else { throw CutError(reason: "the connection to \(host) was cut") }
        return digest.finish()
    }

    private func checkRange(_ answer: HTTPAnswer) throws {
        let expected = "bytes \(stage.partBytes)-\(file.bytes - 1)/\(file.bytes)"
        if let known, answer.header("Content-Range") == expected, answer.etag ?? known.etag == known.etag { return }
        stage.dropPart()
        throw CutError(reason: "\(host) sent another part of \(name) than was asked for")
    }

    private func wrongSize(_ bytes: String) -> GemmaError {
        stage.dropPart()
        return .download(
            "\(name) has \(bytes) bytes, the manifest says \(file.bytes); the repository is damaged, don't use it")
    }
}

private let manifestLimit = 16 << 20

/// Throws unless the answer is a file.
private func refuse(_ answer: HTTPAnswer, _ what: String) throws {
    let problem: String
    switch answer.status {
    case 200, 206:
        if [nil, "identity"].contains(answer.header("Content-Encoding")) { return }
        problem = "sends \(what) compressed; try again later"
    case 401, 403:
        problem =
            "refuses \(what): it is private or gated, or doesn't exist; the app has no account there, so copy the bundle by hand"
    case 404: problem = "does not have \(what); check the address, OWNER/NAME of a bundle that gemma-export push wrote"
    case 429, 500...599: throw CutError(reason: "\(answer.host) answers \(answer.status)")
    default: problem = "answers \(answer.status) for \(what); try again later"
    }
    throw GemmaError.download("\(answer.host) \(problem)")
}
