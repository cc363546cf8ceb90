import Foundation

/// Bytes a bundle takes in memory: the artifact's files, its caches, a chunk's work.
public func neededBytes(_ manifest: Manifest) -> Double {
    func files(_ graph: String) -> Set<String> { Set((manifest.graphs[graph] ?? []).map(\.file)) }
    // Loaded for a verification only.
    let alone = files("exact").subtracting(files("decode")).reduce(0) { $0 + (manifest.artifact[$1]?.bytes ?? 0) }
    return Double(manifest.artifactBytes - alone) + manifest.cacheBytes + Double(4 * workRows * manifest.vocabSize)
}

/// Why a bundle does not fit into a device's memory, in words; nil where it does.
public func misfit(_ manifest: Manifest, deviceBytes: Double) -> String? {
    let needed = neededBytes(manifest)
    if needed <= deviceBytes * usableShare { return nil }
    return manifest.modelID
        + String(format: " needs about %.1f GB, and this device has %.1f GB in all", needed / 1e9, deviceBytes / 1e9)
        + ", of which an app can use about half. Export a smaller size, a recipe of fewer bits, or a shorter --context."
}

private let workRows = 4  // of logits
private let usableShare = 0.5  // the system and other apps hold the rest
