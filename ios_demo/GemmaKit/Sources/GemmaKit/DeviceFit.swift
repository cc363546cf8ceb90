import Foundation

/// Bytes of memory that a bundle needs: the artifact's files, its caches and its logits.
public func neededBytes(_ manifest: Manifest) -> Double {
    func files(_ graph: String) -> Set<String> { Set((manifest.graphs[graph] ?? []).map(\.file)) }
    let exactOnly = files("exact").subtracting(files("decode"))  // loaded only to verify the bundle
    let exactBytes = exactOnly.reduce(0) { $0 + (manifest.artifact[$1]?.bytes ?? 0) }
    return Double(manifest.artifactBytes - exactBytes) + manifest.cacheBytes + Double(4 * logitRows * manifest.vocabSize)
}

/// A message that says why a bundle doesn't fit into the memory that the app may use; nil if it fits.
public func memoryProblem(_ manifest: Manifest, availableBytes: Double) -> String? {
    let needed = neededBytes(manifest)
    if needed <= availableBytes { return nil }
    return manifest.modelID
        + String(format: " needs about %.1f GB; this app can use %.1f GB now", needed / 1e9, availableBytes / 1e9)
        + ". Close other apps, or export a smaller size, a recipe with fewer bits, or a shorter --context."
}

private let logitRows = 4  // that are in memory at once
