package gemma.core

/** Bytes a bundle takes in memory: the artifact's files, its caches, a chunk's work. */
fun neededBytes(manifest: Manifest): Long {
    val notArtifact = manifest.roles.values + (manifest.graphs["exact"]?.file?.takeIf { it != manifest.graphs["decode"]?.file })
    val artifact = manifest.files.filterKeys { it !in notArtifact }.values.sumOf { it.bytes }
    val work = 4L * manifest.vocabSize * WORK_ROWS
    return artifact + manifest.cacheBytes + work
}

/** Why a bundle does not fit into a device's memory, in words; null where it does. */
fun misfit(manifest: Manifest, deviceBytes: Long): String? {
    val needed = neededBytes(manifest)
    if (needed <= deviceBytes * USABLE_SHARE) return null
    return "%s needs about %.1f GB, and this device has %.1f GB in all, of which an app can use about half. ".format(
        manifest.model.id,
        needed / 1e9,
        deviceBytes / 1e9,
    ) + "Export a smaller size, a recipe of fewer bits, or a shorter --context."
}

private const val WORK_ROWS = 4 // of logits
private const val USABLE_SHARE = 0.5 // the system and other apps hold the rest
