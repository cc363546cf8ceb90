package gemma.core

import java.io.File
import java.io.IOException
import java.security.MessageDigest

const val MANIFEST = "manifest.json"

/** A bundle's folder and its manifest. */
data class Bundle(val directory: File, val manifest: Manifest) {
    /** sha256 of the manifest, which has the digests of all files; it names the bundle in figures. */
    fun digest(): String = sha256(File(directory, MANIFEST)) {}

    /** The file with a role; throws BundleException if there is none. */
    fun path(role: String): File {
        val name = manifest.roles[role] ?: throw BundleException(
            "the bundle ${directory.name} has no $role; its roles are: ${manifest.roles.keys.joinToString()}; " +
                "export the model again",
        )
        return File(directory, name)
    }

    /** A graph that has one part; throws BundleException if it is missing or split into several. */
    fun graph(name: String): Graph = manifest.graphs[name].orEmpty().let { parts ->
        parts.singleOrNull() ?: throw BundleException(
            "the bundle ${directory.name} has ${parts.size} parts of the $name graph, expected 1; export the model again",
        )
    }
}

/**
 * Opens a bundle and checks it: known schema version, every file present and unaltered.
 *
 * Calls `onProgress` with the share of bytes read, 0 to 1. Reads none of a bundle that was `checked` before.
 */
fun openBundle(directory: File, checked: CheckedBundles? = null, onProgress: (Double) -> Unit = {}): Bundle {
    val bundle = presentBundle(directory)
    val manifest = bundle.manifest
    if (checked == null || !checked.holds(directory, manifest)) {
        checkDigests(directory, manifest, onProgress)
        checked?.remember(directory, manifest)
    }
    return bundle
}

/** A bundle whose files are all there and have the right sizes. Their content is not checked. */
internal fun presentBundle(directory: File): Bundle {
    val manifest = manifestOf(directory)
    val used = manifest.graphs.values.flatten().map { it.file } + manifest.roles.values
    used.firstOrNull { it !in manifest.files }?.let {
        throw BundleException("manifest.json uses $it but has no digest for it; export the model again")
    }
    manifest.files.forEach { (name, file) -> checkPresent(directory, name, file) }
    return Bundle(directory, manifest)
}

internal fun manifestOf(directory: File): Manifest = Manifest.parse(readText(File(directory, MANIFEST)))

/** Removes the files of a folder that a manifest doesn't name. */
internal fun removeOthers(directory: File, manifest: Manifest) {
    val kept = manifest.files.keys + MANIFEST
    directory.walkBottomUp().filter { it.isFile && it.relativeTo(directory).invariantSeparatorsPath !in kept }.forEach { it.delete() }
}

/** The whole text of a bundle's file; throws BundleException if it can't be read. */
internal fun readText(path: File): String = String(readBytes(path), Charsets.UTF_8)

internal fun readBytes(path: File): ByteArray = try {
    path.readBytes()
} catch (error: IOException) {
    throw unreadable(path, error)
}

private fun unreadable(path: File, error: IOException) =
    BundleException("${path.name} can't be read: ${error.message}; copy the whole bundle folder again", error)

/** Whether a name in a manifest or an archive can't leave the folder that it is in. */
internal fun staysInside(name: String): Boolean =
    name.isNotEmpty() && '\\' !in name && '\u0000' !in name && name.split('/').none { it.isEmpty() || it == "." || it == ".." }

/** Whether every file system takes such a name. */
internal fun isShort(name: String): Boolean = name.length <= 200 && name.count { it == '/' } <= 8

internal const val MAX_FILES = 1000 // of a bundle

private fun checkPresent(directory: File, name: String, file: BundleFile) {
    if (!staysInside(name)) {
        throw BundleException("manifest.json names \"$name\", which is outside of the bundle; export the model again")
    }
    val path = File(directory, name)
    if (!isInside(path, directory)) {
        throw BundleException("$name is a link to a file outside of the bundle; copy the whole bundle folder again")
    }
    if (!path.isFile) throw BundleException("$name is missing; copy the whole bundle folder again")
    if (path.length() != file.bytes) {
        throw BundleException(
            "$name has ${path.length()} bytes, the manifest says ${file.bytes}; copy the whole bundle folder again",
        )
    }
}

private fun isInside(path: File, directory: File): Boolean = try {
    path.canonicalPath.startsWith(directory.canonicalPath + File.separator)
} catch (error: IOException) {
    throw unreadable(path, error)
}

private fun checkDigests(directory: File, manifest: Manifest, onProgress: (Double) -> Unit) {
    val total = maxOf(1, manifest.files.values.sumOf { it.bytes })
    var done = 0L
    for ((name, file) in manifest.files) {
        val digest = sha256(File(directory, name)) { read ->
            done += read
            onProgress(done.toDouble() / total)
        }
        if (digest != file.sha256) {
            throw BundleException(
                "$name was altered: its sha256 is ${digest.take(12)}…, the manifest says " +
                    "${file.sha256.take(12)}…; copy or export the bundle again",
            )
        }
    }
}

internal fun sha256(path: File, onRead: (Int) -> Unit): String {
    val digest = MessageDigest.getInstance("SHA-256")
    try {
        path.inputStream().use { stream ->
            readBlocks(stream) { block, count ->
                digest.update(block, 0, count)
                onRead(count)
            }
        }
    } catch (error: IOException) {
        throw unreadable(path, error)
    }
    return hex(digest)
}

internal fun hex(digest: MessageDigest): String = digest.digest().joinToString("") { String.format("%02x", it) }
