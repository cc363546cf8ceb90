import Foundation

/// A bundle's folder and its manifest.
public struct ModelBundle {
    public let directory: URL
    public let manifest: Manifest

    public init(directory: URL, manifest: Manifest) {
        self.directory = directory
        self.manifest = manifest
    }

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

    /// Opens a bundle and checks it: known schema version, every file present and unaltered.
    ///
    /// Calls `onProgress` with the share of bytes read, 0 to 1. Cancelling the task stops it.
    public static func open(_ directory: URL, onProgress: (Double) -> Void = { _ in }) throws -> ModelBundle {
        let manifest = try Manifest.parse(readFile(directory.appendingPathComponent("manifest.json")))
        let used = manifest.graphs.values.flatMap { $0 }.map(\.file) + manifest.roles.values
        if let unlisted = used.first(where: { manifest.files[$0] == nil }) {
            throw GemmaError.bundle("manifest.json uses \(unlisted) but has no digest for it; export the model again")
        }
        for (name, file) in manifest.files { try checkPresent(directory, name, file) }
        try checkDigests(directory, manifest, onProgress)
        return ModelBundle(directory: directory, manifest: manifest)
    }
}

/// The contents of a bundle's file; throws a bundle error if it can't be read.
func readFile(_ path: URL) throws -> Data {
    do {
        return try Data(contentsOf: path, options: .mappedIfSafe)
    } catch {
        throw GemmaError.bundle("\(path.lastPathComponent) can't be read; copy the whole bundle folder again")
    }
}

private func checkPresent(_ directory: URL, _ name: String, _ file: BundleFile) throws {
    let parts = name.split(separator: "/", omittingEmptySubsequences: false)
    if name.hasPrefix("/") || parts.contains("..") || name.contains("\\") || name.unicodeScalars.contains("\0") {
        throw GemmaError.bundle("manifest.json names \"\(name)\", which is outside of the bundle; export the model again")
    }
    let path = directory.appendingPathComponent(name)
    let root = directory.resolvingSymlinksInPath().path + "/"
    guard path.resolvingSymlinksInPath().path.hasPrefix(root) else {
        throw GemmaError.bundle("\(name) is a link to a file outside of the bundle; copy the whole bundle folder again")
    }
    let attributes = try? FileManager.default.attributesOfItem(atPath: path.resolvingSymlinksInPath().path)
    guard let size = attributes?[.size] as? NSNumber, attributes?[.type] as? FileAttributeType == .typeRegular else {
        throw GemmaError.bundle("\(name) is missing; copy the whole bundle folder again")
    }
    guard size.intValue == file.bytes else {
        throw GemmaError.bundle(
            "\(name) has \(size) bytes, the manifest says \(file.bytes); copy the whole bundle folder again")
    }
}

private func checkDigests(_ directory: URL, _ manifest: Manifest, _ onProgress: (Double) -> Void) throws {
    let total = max(1, manifest.files.values.reduce(0) { $0 + $1.bytes })
    var done = 0
    for (name, file) in manifest.files.sorted(by: { $0.key < $1.key }) {
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

private func digestOfFile(_ path: URL, _ onRead: (Int) -> Void) throws -> String {
    let block = 1 << 20
    do {
        let handle = try FileHandle(forReadingFrom: path)
        defer { try? handle.close() }
        var digest = Digest()
        while let data = try handle.read(upToCount: block), !data.isEmpty {
            try Task.checkCancellation()
            digest.update(data)
            onRead(data.count)
        }
        return digest.finish()
    } catch let error as CancellationError {
        throw error
    } catch {
        throw GemmaError.bundle("\(path.lastPathComponent) can't be read; copy the whole bundle folder again")
    }
}
