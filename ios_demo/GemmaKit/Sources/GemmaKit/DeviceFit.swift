import Foundation

/// Bytes of memory that a bundle needs: the artifact's files, its caches and its logits.
public func neededBytes(_ manifest: Manifest) -> Double {
    func files(_ graph: String) -> Set<String> { Set((manifest.graphs[graph] ?? []).map(\.file)) }
    let exactOnly = files("exact").subtracting(files("decode"))  // loaded only to verify the bundle
    let exactBytes = exactOnly.reduce(0) { $0 + (manifest.artifact[$1]?.bytes ?? 0) }
    return Double(manifest.artifactBytes - exactBytes) + manifest.cacheBytes + Double(4 * logitRows * manifest.vocabSize)
}

/// A message that says why a bundle doesn't fit into the device's memory; nil if it fits.
public func memoryProblem(_ manifest: Manifest, deviceBytes: Double) -> String? {
    let needed = neededBytes(manifest)
    if needed <= deviceBytes * usableShare { return nil }
    return manifest.modelID
        + String(format: " needs about %.1f GB; this device has %.1f GB", needed / 1e9, deviceBytes / 1e9)
        + ", and an app can use about half of it. Export a smaller size, a recipe with fewer bits, or a shorter --context."
}

private let logitRows = 4  // that are in memory at once
private let usableShare = 0.5  // the system and other apps use the rest
