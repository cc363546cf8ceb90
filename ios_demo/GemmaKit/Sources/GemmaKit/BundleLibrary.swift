import Foundation

/// The bundles on this device, each a folder. What was checked is remembered in `records`, and what a runtime compiled is
/// in `compiled`, in a folder named by the artifact's digest.
public struct BundleLibrary: Sendable {
    public let folder: URL
    private let records: URL
    private let incoming: URL
    private let downloads: URL
    private let compiled: URL
    private let freeBytes: (@Sendable () -> Double)?

    /// `support` is for the app's own files, `compiled` for files that can be made again. Tests pass `freeBytes`.
    public init(
        folder: URL, support: URL, compiled: URL = compiledModels, freeBytes: (@Sendable () -> Double)? = nil
    ) {
        self.folder = folder
        records = support.appendingPathComponent("checked")
        incoming = support.appendingPathComponent("incoming")
        downloads = support.appendingPathComponent("downloads")
        self.compiled = compiled
        self.freeBytes = freeBytes
    }

    /// The folders that contain a manifest, by name.
    public func bundles() -> [URL] {
        let names = (try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? []
        return names.sorted().map(place)
            .filter { FileManager.default.fileExists(atPath: $0.appendingPathComponent(manifestName).path) }
    }

    /// The bundle with a name; nil if there is none.
    public func bundle(named name: String) -> URL? {
        bundles().first { sameScalars($0.lastPathComponent, name) }
    }

    /// Opens a bundle. Only files that changed since it was last opened are read.
    public func open(_ bundle: URL, onProgress: (Double) -> Void = { _ in }) throws -> ModelBundle {
        let opened = try ModelBundle.open(bundle, checked: checked(bundle), onProgress: onProgress)
        try? remember(opened)  // without a record, its files are only read again
        leaveOutOfBackups(bundle)
        return opened
    }

    /// Copies a bundle from a folder or a zip file, and checks it; returns where it is now. Nothing stays if it fails
    /// or if the task is cancelled.
    public func add(from source: URL, onProgress: @escaping (Double) -> Void = { _ in }) throws -> URL {
        let source = try bundleSource(source)
        let stage = incoming.appendingPathComponent(UUID().uuidString)
        try FileManager.default.createDirectory(at: stage, withIntermediateDirectories: true)
        defer { try? FileManager.default.removeItem(at: stage) }
        try write(manifestName, of: source, to: stage, limit: manifestLimit)
        let files = try ModelBundle.read(stage).manifest.files
        let total = files.values.reduce(0) { $0 + Double($1.bytes) }
        try checkSpace(total)
        var done = 0.0
        for (name, file) in files.sorted(by: { $0.key < $1.key }) {
            try write(name, of: source, to: stage, limit: file.bytes) { count in
                done += Double(count)
                onProgress(done / (2 * max(1, total)))
            }
        }
        _ = try ModelBundle.open(stage) { onProgress(0.5 + $0 / 2) }
        return try admit(stage, name: source.name)
    }

    /// Moves a checked bundle into the library; returns its folder, named `name` or like it.
    func admit(_ bundle: URL, name: String) throws -> URL {
        let place = unusedPlace(name)
        try FileManager.default.moveItem(at: bundle, to: place)
        try? remember(ModelBundle.read(place))
        return place
    }

    /// Downloads that have not ended, by address.
    public func unfinished() -> [UnfinishedDownload] {
        let places = try? FileManager.default.contentsOfDirectory(at: downloads, includingPropertiesForKeys: nil)
        return (places ?? []).compactMap { place in
            let stage = DownloadStage(folder: place)
            return stage.address.map { UnfinishedDownload(address: $0, bytes: stage.bytes, place: place) }
        }.sorted { $0.address < $1.address }
    }

    /// Deletes what has arrived of a download.
    public func discard(_ download: UnfinishedDownload) throws {
        try FileManager.default.removeItem(at: download.place)
    }

    /// Where a download keeps what has arrived: outside of backups.
    func stage(_ address: HubAddress) throws -> DownloadStage {
        try FileManager.default.createDirectory(at: downloads, withIntermediateDirectories: true)
        leaveOutOfBackups(downloads)
        var digest = Digest()
        digest.update(Data(address.description.utf8))
        return DownloadStage(folder: downloads.appendingPathComponent(String(digest.finish().prefix(16))))
    }

    /// Deletes a bundle, and what a runtime compiled for it.
    public func delete(_ bundle: URL) throws {
        try FileManager.default.removeItem(at: bundle)
        try? FileManager.default.removeItem(at: record(bundle))
        clean()
    }

    /// Makes the folder, with a text that says what goes into it: the Files app doesn't show an empty one.
    public func prepare() throws {
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        guard bundles().isEmpty else { return }
        let text = "Copy whole bundle folders of gemma-export here, next to this file.\n"
        try Data(text.utf8).write(to: folder.appendingPathComponent("Copy bundles here.txt"))
    }

    /// Removes what an interrupted import left, and compiled models that no bundle needs any more.
    public func clean() {
        try? FileManager.default.removeItem(at: incoming)
        let needed = Set(bundles().compactMap { try? ModelBundle.read($0).manifest.artifactDigest })
        let found = try? FileManager.default.contentsOfDirectory(at: compiled, includingPropertiesForKeys: nil)
        for model in found ?? [] where !needed.contains(model.lastPathComponent) {
            try? FileManager.default.removeItem(at: model)
        }
    }

    private func checked(_ bundle: URL) -> CheckedFiles {
        let saved = try? JSONDecoder().decode(CheckedFiles.self, from: Data(contentsOf: record(bundle)))
        return saved ?? [:]
    }

    private func remember(_ bundle: ModelBundle) throws {
        try FileManager.default.createDirectory(at: records, withIntermediateDirectories: true)
        try JSONEncoder().encode(bundle.filesNow()).write(to: record(bundle.directory), options: .atomic)
    }

    private func record(_ bundle: URL) -> URL { records.appendingPathComponent(bundle.lastPathComponent + ".json") }

    private func write(
        _ name: String, of source: any BundleSource, to stage: URL, limit: Int, onWritten: @escaping (Int) -> Void = { _ in }
    ) throws {
        let path = stage.appendingPathComponent(name)
        try FileManager.default.createDirectory(at: path.deletingLastPathComponent(), withIntermediateDirectories: true)
        guard let file = fopen(path.path, "wb") else { throw notWritten(name) }
        var isOpen = true
        defer { if isOpen { fclose(file) } }
        try source.read(name, limit: limit) { data in
            guard data.withUnsafeBytes({ fwrite($0.baseAddress, 1, $0.count, file) }) == data.count else {
                throw notWritten(name)
            }
            onWritten(data.count)
        }
        isOpen = false
        guard fclose(file) == 0 else { throw notWritten(name) }
    }

    /// Throws a bundle error if bytes that are still to come don't fit.
    func checkSpace(_ bytes: Double) throws {
        let attributes = try? FileManager.default.attributesOfFileSystem(forPath: records.deletingLastPathComponent().path)
        let system = (attributes?[.systemFreeSize] as? NSNumber)?.doubleValue
        guard let free = freeBytes?() ?? system, free < bytes else { return }
        throw GemmaError.bundle(
            String(format: "%.2f GB are still to come, and %.2f GB are free; free some space", bytes / 1e9, free / 1e9))
    }

    private func unusedPlace(_ name: String) -> URL {
        let names = [name] + (2...999).map { "\(name) \($0)" }
        return place(names.first { !FileManager.default.fileExists(atPath: place($0).path) } ?? UUID().uuidString)
    }

    private func place(_ name: String) -> URL { folder.appendingPathComponent(name, isDirectory: true) }
}

/// A download that can go on: its address as text, and the bytes that have arrived.
public struct UnfinishedDownload: Equatable, Identifiable, Sendable {
    public let address: String
    public let bytes: Int
    let place: URL

    public var id: String { address }
}

/// Where runtimes keep what they compiled.
public let compiledModels = FileManager.default.urls(for: .cachesDirectory, in: .userDomainMask)[0]
    .appendingPathComponent("compiled")

/// A bundle can be copied again, and is too large for a backup.
private func leaveOutOfBackups(_ bundle: URL) {
    var values = URLResourceValues()
    values.isExcludedFromBackup = true
    var folder = bundle
    try? folder.setResourceValues(values)
}

private let manifestLimit = 64 << 20

private func notWritten(_ name: String) -> GemmaError {
    .bundle("\(name) can't be written; free some space")
}
