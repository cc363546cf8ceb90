package gemma.core

/** Bytes of memory that a bundle needs: the artifact's files, its caches and its logits. */
fun neededBytes(manifest: Manifest): Double {
    fun files(graph: String) = manifest.graphs[graph].orEmpty().map { it.file }.toSet()
    val exactOnly = files("exact") - files("decode") // loaded only to verify the bundle
    val artifact = manifest.artifactBytes - exactOnly.sumOf { manifest.files[it]?.bytes ?: 0 }
    val logits = 4.0 * manifest.vocabSize * LOGIT_ROWS
    return artifact + manifest.cacheBytes + logits
}

/**
 * A message that says why a bundle doesn't fit into the device's memory; null if it fits.
 *
 * `heapBytes` is the limit of Java's heap, given for a runtime whose caches are Java's direct buffers: Android
 * counts these as heap.
 */
fun memoryProblem(manifest: Manifest, deviceBytes: Long, heapBytes: Long? = null): String? {
    val id = manifest.model.id
    val needed = neededBytes(manifest)
    if (needed > deviceBytes * USABLE_SHARE) {
        return "%s needs about %.1f GB; this device has %.1f GB, and an app can use about half of it. "
            .format(id, needed / 1e9, deviceBytes / 1e9) +
            "Export a smaller size, a recipe with fewer bits, or a shorter --context."
    }
    if (heapBytes == null || manifest.cacheBytes + HEAP_RESERVE <= heapBytes) return null
    return "%s has caches of %.0f MB; an app's heap is limited to %.0f MB here, and the app itself needs %.0f MB. "
        .format(id, manifest.cacheBytes / 1e6, heapBytes / 1e6, HEAP_RESERVE / 1e6) +
        "Export with a shorter --context, or with --target executorch."
}

private const val LOGIT_ROWS = 4 // that are in memory at once
private const val USABLE_SHARE = 0.5 // the system and other apps use the rest
private const val HEAP_RESERVE = 192_000_000L // a tokenizer of 262,144 pieces and the logits of a golden
