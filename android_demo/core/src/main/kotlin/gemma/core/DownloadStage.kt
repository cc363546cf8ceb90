package gemma.core

import java.io.File
import java.io.FileInputStream
import java.security.MessageDigest

/** The file of a bundle that is being downloaded, and what its server calls the version of these bytes. */
internal data class PartialFile(val sha256: String, val etag: String)

/**
 * What was downloaded so far of one bundle, in a folder of its own. It outlives the process: whole files in `files`, and
 * the beginning of one more in `part`.
 */
internal class DownloadStage(private val folder: File) {
    val files = File(folder, "files")
    val part = File(folder, "part")
    private val about = File(folder, "part.json")
    private val source = File(folder, "address")

    /** The hub's address, as text; null if this is not a download. */
    val address: String? get() = source.takeIf { it.isFile }?.readText()

    val bytes: Long get() = folder.walk().filter { it.isFile }.sumOf { it.length() }

    fun begin(address: HubAddress) {
        files.mkdirs()
        replaceText(source, address.toString())
    }

    /** The version of a file of which `part` holds the beginning; null if it holds none of it. */
    fun partial(file: BundleFile): PartialFile? {
        if (!part.isFile || !about.isFile) return null
        val known = try {
            JsonFields.parse(about.name, readText(about)).let { PartialFile(it.of("sha256").string(), it.of("etag").string()) }
        } catch (_: BundleException) {
            return null // written when the phone was switched off
        }
        return known.takeIf { it.sha256 == file.sha256 && part.length() in 1..file.bytes }
    }

    /** Starts `part` again. Without an `etag` it can't be gone on with by another connection. */
    fun startPart(file: BundleFile, etag: String?) {
        dropPart()
        if (etag != null) replaceText(about, JsonObject(mapOf("sha256" to JsonString(file.sha256), "etag" to JsonString(etag))).write())
    }

    fun dropPart() {
        about.delete()
        part.delete()
    }

    /** Makes `part` a file of the bundle. */
    fun finishPart(name: String) {
        val target = File(files, name)
        target.parentFile?.mkdirs()
        target.delete()
        if (!part.renameTo(target)) throw StorageException("$name can't be written; free some storage")
        dropPart()
    }

    /** Whether a whole file is there and unaltered; removes another file of that name. */
    fun holds(name: String, file: BundleFile, onRead: (Int) -> Unit): Boolean {
        val path = File(files, name)
        if (!path.isFile) return false
        if (path.length() == file.bytes && sha256(path, onRead) == file.sha256) return true
        path.delete()
        return false
    }

    /** The digest of what is in `part`. */
    fun digestOfPart(onRead: (Int) -> Unit): MessageDigest {
        val digest = MessageDigest.getInstance("SHA-256")
        if (!part.isFile) return digest
        FileInputStream(part).use { stream ->
            readBlocks(stream) { block, count ->
                digest.update(block, 0, count)
                onRead(count)
            }
        }
        return digest
    }

    /** Removes files that a manifest doesn't name, such as those of an earlier commit. */
    fun keepOnly(manifest: Manifest) = removeOthers(files, manifest)

    fun delete() = deleteFolder(folder)
}
