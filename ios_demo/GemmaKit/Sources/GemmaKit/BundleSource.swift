import Foundation

/// Where a bundle is imported from. Only files that its manifest lists are read.
protocol BundleSource {
    /// What to name the bundle.
    var name: String { get }

    /// Passes on a file of at most `limit` bytes, piece by piece; throws a bundle error if it is missing or larger.
    func read(_ name: String, limit: Int, _ write: @escaping (Data) throws -> Void) throws
}

/// A folder or a zip file; throws a bundle error if it is neither, or has no bundle.
func bundleSource(_ path: URL) throws -> any BundleSource {
    var isFolder: ObjCBool = false
    guard FileManager.default.fileExists(atPath: path.path, isDirectory: &isFolder) else {
        throw GemmaError.bundle("\(path.lastPathComponent) is missing; choose a bundle's folder or zip file")
    }
    return isFolder.boolValue ? FolderSource(folder: path) : try ZipSource(path)
}

private struct FolderSource: BundleSource {
    let folder: URL

    var name: String { folder.lastPathComponent }

    func read(_ name: String, limit: Int, _ write: @escaping (Data) throws -> Void) throws {
        let path = folder.appendingPathComponent(name)
        var left = limit
        let readable = try readBlocks(path) { block in
            try Task.checkCancellation()
            left -= block.count
            guard left >= 0 else { throw GemmaError.bundle("\(name) is larger than the manifest says; export the model again") }
            try write(Data(block))
        }
        guard readable else { throw GemmaError.bundle("\(name) can't be read; choose the whole bundle folder") }
    }
}

/// A zip file with the bundle's files, or with its folder.
private struct ZipSource: BundleSource {
    let name: String
    private let zip: Zip
    private let folder: String  // "" or a path with / at its end

    init(_ path: URL) throws {
        zip = try Zip(path)
        let manifests = zip.entries.keys.filter { $0 == manifestName || $0.hasSuffix("/" + manifestName) }
        guard let manifest = manifests.min(by: { $0.utf8.count < $1.utf8.count }) else {
            throw GemmaError.bundle("\(path.lastPathComponent) has no \(manifestName); zip a bundle's whole folder")
        }
        folder = String(manifest.dropLast(manifestName.count))
        name = path.deletingPathExtension().lastPathComponent
    }

    func read(_ name: String, limit: Int, _ write: @escaping (Data) throws -> Void) throws {
        guard let entry = zip.entries[folder + name] else {
            throw GemmaError.bundle("\(name) is missing in the zip file; zip the whole bundle folder")
        }
        guard entry.bytes <= limit else {
            throw GemmaError.bundle("\(name) is larger than the manifest says; export the model again")
        }
        try zip.unpack(entry, write: write)
    }
}

let manifestName = "manifest.json"
