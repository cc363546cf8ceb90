import Foundation

public struct DownloadProgress: Equatable, Sendable {
    public let doneBytes: Int
    public let totalBytes: Int
}

/// Downloads bundles from the hub into the library: the manifest, then the files that it lists, all of one commit.
///
/// What has arrived stays after an error and after cancelling, and the next download of the same address goes on from
/// there. The bundle appears in the library only when all of its files have the manifest's digests.
public struct HubDownload: Sendable {
    private let library: BundleLibrary
    private let origin: String
    private let https: Https
    private let pause: TimeInterval  // before a cut connection is opened again; doubles each time

    /// `isMeteredAllowed`: also over mobile data and in Low Data Mode.
    public init(_ library: BundleLibrary, isMeteredAllowed: Bool) {
        self.init(library, isMeteredAllowed: isMeteredAllowed, origin: hub, plainHosts: [], timeout: 20, pause: 1)
    }

    /// For tests: another hub, and hosts that may be asked over http.
    init(
        _ library: BundleLibrary, isMeteredAllowed: Bool, origin: String, plainHosts: Set<String>, timeout: TimeInterval,
        pause: TimeInterval
    ) {
        self.library = library
        self.origin = origin
        self.pause = pause
        https = Https(isMeteredAllowed: isMeteredAllowed, timeout: timeout, plainHosts: plainHosts)
    }

    /// Returns the bundle's folder. Throws GemmaError with what to do. Cancelling the task ends it.
    public func run(
        _ address: HubAddress, onProgress: @escaping @Sendable (DownloadProgress) -> Void = { _ in }
    ) async throws -> URL {
        do {
            return try await download(address, onProgress)
        } catch is CutError {
            throw CancellationError()  // only after cancelling is it not tried again
        } catch let error as CocoaError {
            throw GemmaError.download("the download can't be kept: \(error.localizedDescription); free some storage")
        }
    }

    private func download(_ address: HubAddress, _ onProgress: @escaping @Sendable (DownloadProgress) -> Void) async throws -> URL
    {
        let stage = try library.stage(address)
        try stage.begin(address)
        let commit = try await fetchManifest(address, stage)
        let manifest = try manifestOf(stage.files)
        try check(manifest)
        let total = manifest.files.values.reduce(0.0) { $0 + Double($1.bytes) }
        try library.checkSpace(total - Double(stage.bytes))
        var done = 0
        for (name, file) in manifest.files.sorted(by: { $0.key < $1.key }) {
            let before = done
            let told = { @Sendable (bytes: Int) in onProgress(DownloadProgress(doneBytes: before + bytes, totalBytes: Int(total)))
            }
            var read = 0
            let isThere = try stage.holds(name, file) { count in
                read += count
                told(read)
            }
            if !isThere { try await fetchFile(url(address, commit, name), name, file, stage, told) }
            done += file.bytes
        }
        try stage.keepOnly(manifest)
        _ = try ModelBundle.read(stage.files).filesNow()
        let place = try library.admit(stage.files, name: address.name)
        try? stage.delete()
        return place
    }

    /// Writes the manifest; returns the commit that it is of, or the revision where the server doesn't tell.
    private func fetchManifest(_ address: HubAddress, _ stage: DownloadStage) async throws -> String {
        let revision = address.revision ?? "main"
        let source = try url(address, revision, manifestName)
        return try await attempts { _ in
            let receiver = ManifestReceiver(address)
            try await https.get(source, [:], receiver)
            try receiver.data.write(to: stage.files.appendingPathComponent(manifestName), options: .atomic)
            let commit = receiver.commit ?? ""
            return commit.range(of: #"\A[0-9a-f]{40}\z"#, options: .regularExpression) == nil ? revision : commit
        }
    }

    private func fetchFile(
        _ source: URL, _ name: String, _ file: BundleFile, _ stage: DownloadStage, _ told: @escaping @Sendable (Int) -> Void
    ) async throws {
        let digest = try await attempts { attempt in
            let known = stage.partial(file)
            if known == nil { stage.dropPart() }
            var read = 0
            var arrived = try stage.digestOfPart { count in
                read += count
                told(read)
            }
            if known != nil && stage.partBytes == file.bytes { return arrived.finish() }  // ended before it was checked
            let headers = known.map { ["Range": "bytes=\(stage.partBytes)-", "If-Range": $0.etag] }
            let receiver = FileReceiver(name, file, stage, known, arrived, attempt, told)
            try await https.get(source, headers ?? [:], receiver)
            return try receiver.finish()
        }
        guard digest == file.sha256 else {
            stage.dropPart()
            throw GemmaError.download(
                "\(name) arrived altered: its sha256 is \(digest.prefix(12))…, the manifest says \(file.sha256.prefix(12))…; "
                    + "try again")
        }
        try stage.finishPart(name)
    }

    /// Tries again after cut connections, until several in a row have brought nothing.
    private func attempts<T>(_ work: (Attempt) async throws -> T) async throws -> T {
        var failures = 0
        while true {
            try Task.checkCancellation()
            let attempt = Attempt()
            do {
                return try await work(attempt)
            } catch let error as CutError {
                try Task.checkCancellation()
                failures = attempt.hasProgressed ? 1 : failures + 1
                if failures == 5 {
                    throw GemmaError.download(
                        "the download was interrupted: \(error.reason); what has arrived is kept, try again")
                }
                try await Task.sleep(nanoseconds: UInt64(pause * 1e9) << (failures - 1))
            }
        }
    }

    private func url(_ address: HubAddress, _ revision: String, _ name: String) throws -> URL {
        guard let url = address.url(origin, at: revision, name) else {
            throw GemmaError.download("\(address) can't be asked for \(name); check the address")
        }
        return url
    }

    private func check(_ manifest: Manifest) throws {
        for (name, file) in manifest.files {
            let parts = name.split(separator: "/", omittingEmptySubsequences: false)
            let staysInside = parts.allSatisfy { !["", ".", ".."].contains($0) } && !name.contains { "\\\0".contains($0) }
            let isShort = name.utf16.count <= 200 && parts.count <= 9
            guard staysInside, isShort, name.lowercased() != manifestName, file.bytes >= 0 else {
                throw GemmaError.download(
                    "the manifest names \"\(name.prefix(80))\", which is not a file inside of a bundle; don't use it")
            }
        }
        guard manifest.files.count <= 1000 else {
            throw GemmaError.download("the manifest lists more than 1000 files, so it is not a bundle")
        }
        guard Set(manifest.files.keys.map { $0.lowercased() }).count == manifest.files.count else {
            throw GemmaError.download(
                "the manifest has two names that differ only in case, which some storage takes for one; don't use it")
        }
    }
}

/// Whether a connection has brought anything.
final class Attempt: @unchecked Sendable {
    var hasProgressed = false
}
