package gemma.core

import java.io.File
import java.security.MessageDigest

/**
 * Remembers which bundles were checked, by size and time of their files, so that a bundle is hashed once and not each
 * time it is opened. It tells a file that was replaced, not one that somebody altered and gave its old time.
 */
class CheckedBundles(private val file: File) {
    private val known: MutableMap<String, String> = read()

    /** Whether a bundle's files are those that were checked. */
    internal fun holds(directory: File, manifest: Manifest): Boolean = known[directory.canonicalPath] == stamp(directory, manifest)

    /** Throws StorageException if it can't be written down. */
    internal fun remember(directory: File, manifest: Manifest) {
        known[directory.canonicalPath] = stamp(directory, manifest)
        known.keys.retainAll { File(it).isDirectory }
        replaceText(file, JsonObject(known.mapValues { JsonString(it.value) }).write())
    }

    private fun stamp(directory: File, manifest: Manifest): String {
        val digest = MessageDigest.getInstance("SHA-256")
        for ((name, expected) in manifest.files.toSortedMap()) {
            val path = File(directory, name)
            digest.update("$name\n${expected.sha256} ${path.length()} ${path.lastModified()}\n".toByteArray())
        }
        return hex(digest)
    }

    /** A damaged file only means that bundles are checked again. */
    private fun read(): MutableMap<String, String> {
        if (!file.isFile) return HashMap()
        return try {
            HashMap(JsonFields.parse(file.name, readText(file)).map { it.string() })
        } catch (_: BundleException) {
            HashMap()
        }
    }
}
