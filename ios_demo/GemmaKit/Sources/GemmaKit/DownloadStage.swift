import Foundation

/// The file of a bundle that is being downloaded, and what its server calls the version of these bytes.
struct PartialFile: Codable, Equatable, Sendable {
    let sha256: String
    let etag: String
}

/// What was downloaded so far of one bundle, in a folder of its own. It outlives the process: whole files in `files`, and
/// the beginning of one more in `part`.
struct DownloadStage: Sendable {
    let folder: URL
    var files: URL { folder.appendingPathComponent("files") }
    var part: URL { folder.appendingPathComponent("part") }
    private var about: URL { folder.appendingPathComponent("part.json") }
    private var source: URL { folder.appendingPathComponent("address") }

    /// The hub's address, as text; nil if this is not a download.
    var address: String? { try? String(contentsOf: source, encoding: .utf8) }

    var bytes: Int {
        let found = FileManager.default.enumerator(at: folder, includingPropertiesForKeys: nil)
        return (found?.allObjects as? [URL] ?? []).reduce(0) { $0 + (length($1) ?? 0) }
    }

    func begin(_ address: HubAddress) throws {
        try FileManager.default.createDirectory(at: files, withIntermediateDirectories: true)
        try Data(address.description.utf8).write(to: source, options: .atomic)
    }

    var partBytes: Int { length(part) ?? 0 }

    /// The version of a file of which `part` holds the beginning; nil if it holds none of it.
    func partial(_ file: BundleFile) -> PartialFile? {
        guard let known = try? JSONDecoder().decode(PartialFile.self, from: Data(contentsOf: about)) else { return nil }
        return known.sha256 == file.sha256 && partBytes > 0 && partBytes <= file.bytes ? known : nil
    }

    /// Starts `part` again. Without an `etag` it can't be gone on with by another connection.
    func startPart(_ file: BundleFile, _ etag: String?) throws {
        dropPart()
        guard let etag else { return }
        try JSONEncoder().encode(PartialFile(sha256: file.sha256, etag: etag)).write(to: about, options: .atomic)
    }

    func dropPart() {
        try? FileManager.default.removeItem(at: about)
        try? FileManager.default.removeItem(at: part)
    }

    /// Makes `part` a file of the bundle.
    func finishPart(_ name: String) throws {
        let target = files.appendingPathComponent(name)
        try FileManager.default.createDirectory(at: target.deletingLastPathComponent(), withIntermediateDirectories: true)
        try? FileManager.default.removeItem(at: target)
        if !FileManager.default.fileExists(atPath: part.path) { try Data().write(to: part) }  // an empty file
        try FileManager.default.moveItem(at: part, to: target)
        dropPart()
    }

    /// Whether a whole file is there and unaltered; removes another file of that name.
    func holds(_ name: String, _ file: BundleFile, _ onRead: (Int) -> Void) throws -> Bool {
        let path = files.appendingPathComponent(name)
        guard FileManager.default.fileExists(atPath: path.path) else { return false }
        if length(path) == file.bytes, try digestOfFile(path, onRead) == file.sha256 { return true }
        try FileManager.default.removeItem(at: path)
        return false
    }

    /// The digest of what is in `part`.
    func digestOfPart(_ onRead: (Int) -> Void) throws -> Digest {
        var digest = Digest()
        _ = try readBlocks(part) { block in
            try Task.checkCancellation()
            digest.update(block)
            onRead(block.count)
        }
        return digest
    }

    /// Removes files that a manifest doesn't name, such as those of an earlier commit.
    func keepOnly(_ manifest: Manifest) throws {
        let kept = Set(manifest.files.keys).union([manifestName])
        let names = FileManager.default.enumerator(atPath: files.path)?.allObjects as? [String] ?? []
        for name in names where !kept.contains(name) && length(files.appendingPathComponent(name)) != nil {
            try FileManager.default.removeItem(at: files.appendingPathComponent(name))
        }
    }

    func delete() throws { try FileManager.default.removeItem(at: folder) }
}

/// Bytes of a file; nil if it is none.
private func length(_ path: URL) -> Int? {
    let attributes = try? FileManager.default.attributesOfItem(atPath: path.path)
    guard attributes?[.type] as? FileAttributeType == .typeRegular else { return nil }
    return (attributes?[.size] as? NSNumber)?.intValue
}
