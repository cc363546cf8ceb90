package gemma.core

/** Bytes a bundle takes in memory: the artifact's files, its caches, a chunk's work. */
fun neededBytes(manifest: Manifest): Double {
    fun files(graph: String) = manifest.graphs[graph].orEmpty().map { it.file }.toSet()
    val alone = files("exact") - files("decode") // loaded for a verification only
    val artifact = manifest.artifactBytes - alone.sumOf { manifest.files[it]?.bytes ?: 0 }
    val work = 4.0 * manifest.vocabSize * WORK_ROWS
    return artifact + manifest.cacheBytes + work
}

/**
 * Why a bundle does not fit into a device's memory, in words; null where it does.
 *
 * `heapBytes` is how far Java's heap may grow, for a runtime whose caches are Java's buffers: on Android
 * direct ones count as heap too.
 */
fun misfit(manifest: Manifest, deviceBytes: Long, heapBytes: Long? = null): String? {
    val id = manifest.model.id
    val needed = neededBytes(manifest)
    if (needed > deviceBytes * USABLE_SHARE) {
        return "%s needs about %.1f GB, and this device has %.1f GB in all, of which an app can use about half. "
            .format(id, needed / 1e9, deviceBytes / 1e9) +
            "Export a smaller size, a recipe of fewer bits, or a shorter --context."
    }
    if (heapBytes == null || manifest.cacheBytes + HEAP_RESERVE <= heapBytes) return null
    return "%s has caches of %.0f MB, and an app's heap ends at %.0f MB here, of which the app needs %.0f MB itself. "
        .format(id, manifest.cacheBytes / 1e6, heapBytes / 1e6, HEAP_RESERVE / 1e6) +
        "Export with a shorter --context, or with --target executorch."
}

private const val WORK_ROWS = 4 // of logits
private const val USABLE_SHARE = 0.5 // the system and other apps hold the rest
private const val HEAP_RESERVE = 192_000_000L // a tokenizer of 262,144 pieces, and a golden's logits
