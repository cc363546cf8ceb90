import Foundation

/// A bundle's folder and its manifest.
public struct ModelBundle: Sendable {
    public let directory: URL
    public let manifest: Manifest

    public init(directory: URL, manifest: Manifest) {
        self.directory = directory
        self.manifest = manifest
    }

    /// sha256 of the manifest, which has the digests of all files; it names the bundle in figures.
    public func digest() throws -> String { try digestOfFile(directory.appendingPathComponent(manifestName)) { _ in } }

    /// The file with a role; throws a bundle error if there is none.
    public func path(_ role: String) throws -> URL {
        guard let name = manifest.roles[role] else {
            throw GemmaError.bundle(
                "the bundle \(directory.lastPathComponent) has no \(role); its roles are: "
                    + "\(manifest.roles.keys.sorted().joined(separator: ", ")); export the model again"
            )
        }
        return directory.appendingPathComponent(name)
    }

    /// A graph that has one part; throws a bundle error if it is missing or split into several.
    public func graph(_ name: String) throws -> Graph {
        let parts = manifest.graphs[name] ?? []
        guard parts.count == 1 else {
            throw GemmaError.bundle(
                "the bundle \(directory.lastPathComponent) has \(parts.count) parts of the \(name) graph, expected 1; "
                    + "export the model again"
            )
        }
        return parts[0]
    }

    /// Opens a bundle and checks it: known schema version, every file present and unaltered. Files that were found
    /// unaltered before, and have the same size and time of change since, are not read again.
    ///
    /// Calls `onProgress` with the share of bytes read, 0 to 1. Cancelling the task stops it.
    public static func open(
        _ directory: URL, checked: CheckedFiles = [:], onProgress: (Double) -> Void = { _ in }
    ) throws -> ModelBundle {
        let bundle = try read(directory)
        let manifest = bundle.manifest
        let found = try bundle.filesNow()
        try checkDigests(directory, manifest.files.filter { found[$0.key] != checked[$0.key] }, onProgress)
        return bundle
    }

    /// Reads the manifest alone; throws a bundle error if it uses a file that it doesn't list.
    public static func read(_ directory: URL) throws -> ModelBundle {
        let manifest = try manifestOf(directory)
        let used = manifest.graphs.values.flatMap { $0 }.map(\.file) + manifest.roles.values
        if let unlisted = used.first(where: { manifest.files[$0] == nil }) {
            throw GemmaError.bundle("manifest.json uses \(unlisted) but has no digest for it; export the model again")
        }
        try manifest.files.keys.forEach(checkInside)
        return ModelBundle(directory: directory, manifest: manifest)
    }

    /// The bundle's files as they are now; throws a bundle error if one is missing or has another size.
    public func filesNow() throws -> CheckedFiles {
        var files: CheckedFiles = [:]
        for (name, file) in manifest.files { files[name] = try fileNow(directory, name, file) }
        return files
    }
}

func manifestOf(_ directory: URL) throws -> Manifest {
    try Manifest.parse(readFile(directory.appendingPathComponent(manifestName)))
}

/// A file that was found unaltered.
public struct CheckedFile: Codable, Equatable, Sendable {
    let sha256: String
    let bytes: Int
    let modified: Date
}

/// By path in the bundle.
public typealias CheckedFiles = [String: CheckedFile]

/// The contents of a bundle's file; throws a bundle error if it can't be read.
func readFile(_ path: URL) throws -> Data {
    do {
        return try Data(contentsOf: path, options: .mappedIfSafe)
    } catch {
        throw GemmaError.bundle("\(path.lastPathComponent) can't be read; copy the whole bundle folder again")
    }
}

/// Throws a bundle error if a path leaves the bundle's folder.
private func checkInside(_ name: String) throws {
    let parts = name.split(separator: "/", omittingEmptySubsequences: false)
    if name.hasPrefix("/") || parts.contains("..") || name.contains("\\") || name.unicodeScalars.contains("\0") {
        throw GemmaError.bundle("manifest.json names \"\(name)\", which is outside of the bundle; export the model again")
    }
}

private func fileNow(_ directory: URL, _ name: String, _ file: BundleFile) throws -> CheckedFile {
    let path = directory.appendingPathComponent(name).resolvingSymlinksInPath()
    let root = directory.resolvingSymlinksInPath().path + "/"
    guard path.path.hasPrefix(root) else {
        throw GemmaError.bundle("\(name) is a link to a file outside of the bundle; copy the whole bundle folder again")
    }
    let attributes = try? FileManager.default.attributesOfItem(atPath: path.path)
    guard let size = attributes?[.size] as? NSNumber, let modified = attributes?[.modificationDate] as? Date,
        attributes?[.type] as? FileAttributeType == .typeRegular
    else {
        throw GemmaError.bundle("\(name) is missing; copy the whole bundle folder again")
    }
    guard size.intValue == file.bytes else {
        throw GemmaError.bundle(
            "\(name) has \(size) bytes, the manifest says \(file.bytes); copy the whole bundle folder again")
    }
    return CheckedFile(sha256: file.sha256, bytes: file.bytes, modified: modified)
}

private func checkDigests(_ directory: URL, _ files: [String: BundleFile], _ onProgress: (Double) -> Void) throws {
    let total = max(1, files.values.reduce(0) { $0 + $1.bytes })
    var done = 0
    for (name, file) in files.sorted(by: { $0.key < $1.key }) {
        let digest = try digestOfFile(directory.appendingPathComponent(name)) { read in
            done += read
            onProgress(Double(done) / Double(total))
        }
        guard digest == file.sha256 else {
            throw GemmaError.bundle(
                "\(name) was altered: its sha256 is \(digest.prefix(12))…, the manifest says "
                    + "\(file.sha256.prefix(12))…; copy or export the bundle again"
            )
        }
    }
}

func digestOfFile(_ path: URL, _ onRead: (Int) -> Void) throws -> String {
    var digest = Digest()
    let readable = try readBlocks(path) { block in
        try Task.checkCancellation()
        digest.update(block)
        onRead(block.count)
    }
    guard readable else {
        throw GemmaError.bundle("\(path.lastPathComponent) can't be read; copy the whole bundle folder again")
    }
    return digest.finish()
}

/// Reads a file into one buffer, block by block; returns whether all of it could be read. `FileHandle` would make an
/// object per block, which Apple's systems free only when the thread's autorelease pool is drained.
func readBlocks(_ path: URL, _ onBlock: (UnsafeRawBufferPointer) throws -> Void) throws -> Bool {
    guard let file = fopen(path.path, "rb") else { return false }
    defer { fclose(file) }
    setvbuf(file, nil, _IONBF, 0)
    let block = UnsafeMutableRawBufferPointer.allocate(byteCount: 1 << 20, alignment: 16)
    defer { block.deallocate() }
    while true {
        let count = fread(block.baseAddress, 1, block.count, file)
        if count > 0 { try onBlock(UnsafeRawBufferPointer(rebasing: block[..<count])) }
        if count < block.count { return ferror(file) == 0 }
    }
}
