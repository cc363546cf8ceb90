package gemma.core

/**
 * Bytes of memory that a bundle needs: the artifact's files, its caches and its logits.
 *
 * Gemma 4's per-layer table counts although it stays in its file: what ONNX Runtime packs of the rest takes about as
 * much more.
 */
fun neededBytes(manifest: Manifest): Double {
    fun files(graph: String) = manifest.graphs[graph].orEmpty().map { it.file }.toSet()
    val exactOnly = files("exact") - files("decode") // loaded only to verify the bundle
    val artifact = manifest.artifactBytes - exactOnly.sumOf { manifest.files[it]?.bytes ?: 0 }
    val logits = 4.0 * manifest.vocabSize * LOGIT_ROWS
    return artifact + manifest.cacheBytes + logits
}

/** A message that says why a bundle doesn't fit into the device's memory; null if it fits. */
fun memoryProblem(manifest: Manifest, deviceBytes: Long): String? {
    val needed = neededBytes(manifest)
    if (needed <= deviceBytes * USABLE_SHARE) return null
    return "%s needs about %.1f GB; this device has %.1f GB, and an app can use about half of it. "
        .format(manifest.model.id, needed / 1e9, deviceBytes / 1e9) +
        "Export a smaller size, a recipe with fewer bits, or a shorter --context."
}

private const val LOGIT_ROWS = 4 // that are in memory at once
private const val USABLE_SHARE = 0.5 // the system and other apps use the rest
