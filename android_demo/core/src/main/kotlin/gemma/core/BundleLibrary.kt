package gemma.core

import java.io.File
import java.io.IOException
import java.io.InputStream
import java.security.MessageDigest
import java.util.zip.ZipInputStream

/** What the app shows of a bundle that it has not loaded. */
data class BundleSummary(val directory: File, val model: String, val recipe: String, val target: String, val bytes: Long)

/** A download that can go on: its address as text, and the bytes that have arrived. */
data class UnfinishedDownload(val address: String, val bytes: Long, internal val place: File)

/** The bundles on this device, side by side in one folder: each by its name. */
class BundleLibrary(private val folder: File, private val freeBytes: () -> Long = { folder.usableSpace }) {
    init {
        folder.mkdirs()
        // What an interrupted import has left.
        folder.listFiles().orEmpty().filter { it.name.startsWith(PART) }.forEach(::deleteFolder)
    }

    /** Folders with a manifest, by name. */
    fun bundles(): List<File> =
        folder.listFiles().orEmpty().filter { !it.name.startsWith(".") && File(it, MANIFEST).isFile }.sortedBy { it.name }

    /** Throws BundleException if the manifest can't be read. */
    fun summary(bundle: File): BundleSummary {
        val manifest = manifestOf(bundle)
        val bytes = manifest.files.values.sumOf { it.bytes }
        return BundleSummary(bundle, manifest.model.id, manifest.quantization.recipe, manifest.target.name, bytes)
    }

    /** Deletes a bundle of this library; throws StorageException. */
    fun delete(bundle: File) {
        require(bundle.parentFile == folder) { "$bundle is not in $folder" }
        deleteFolder(bundle)
    }

    /**
     * Unpacks and checks a bundle from a zip archive; returns its folder, named after the archive's own folder or else
     * `name`. Nothing is left of one that is damaged, unsafe, or larger than the free storage.
     *
     * Calls `onBytes` with the bytes written so far; if it throws, nothing is left either.
     */
    fun importZip(name: String, archive: InputStream, checked: CheckedBundles? = null, onBytes: (Long) -> Unit = {}): File =
        import(name, checked, onBytes) { part ->
            ZipInputStream(archive).use { zip ->
                generateSequence { zip.nextEntry }.filterNot { it.isDirectory }.forEach { part.add(it.name, zip) }
            }
        }

    /** Copies and checks a bundle from elsewhere, as `importZip` does: each file's path in the bundle, and its content. */
    fun importFiles(
        name: String,
        files: Map<String, () -> InputStream>,
        checked: CheckedBundles? = null,
        onBytes: (Long) -> Unit = {},
    ): File = import(name, checked, onBytes) { part ->
        files.forEach { (path, open) -> open().use { part.add(path, it) } }
    }

    /** Downloads that have not ended, by address. */
    fun unfinished(): List<UnfinishedDownload> = folder.listFiles().orEmpty().filter { it.name.startsWith(DOWNLOAD) }
        .mapNotNull { place -> DownloadStage(place).let { stage -> stage.address?.let { UnfinishedDownload(it, stage.bytes, place) } } }
        .sortedBy { it.address }

    /** Deletes what has arrived of a download; throws StorageException. */
    fun discard(download: UnfinishedDownload) = deleteFolder(download.place)

    internal fun stage(address: HubAddress): DownloadStage {
        val digest = MessageDigest.getInstance("SHA-256").also { it.update(address.toString().toByteArray()) }
        return DownloadStage(File(folder, DOWNLOAD + hex(digest).take(16)))
    }

    /** Bytes that bundles may still take. */
    internal val room: Long get() = freeBytes() - STORAGE_RESERVE

    /** Moves a checked bundle into the library; returns its folder, named `name` or like it. */
    internal fun admit(bundle: File, name: String, checked: CheckedBundles?): File {
        val target = freeName(name)
        if (!bundle.renameTo(target)) throw IOException("the bundle can't be moved to ${target.name}")
        checked?.remember(target, manifestOf(target))
        return target
    }

    private fun import(name: String, checked: CheckedBundles?, onBytes: (Long) -> Unit, read: (ImportedBundle) -> Unit): File {
        val part = File(folder, "$PART${System.nanoTime()}")
        try {
            val imported = ImportedBundle(part, room, onBytes)
            read(imported)
            val bundle = imported.finish()
            openBundle(bundle)
            return admit(bundle, bundle.name.takeIf { it != part.name } ?: name, checked)
        } catch (error: IOException) {
            throw BundleException("the bundle can't be read: ${error.message}; choose or copy it again", error)
        } catch (error: IllegalArgumentException) { // a name in the archive that is not text
            throw BundleException("the archive is damaged: ${error.message}; copy it again", error)
        } finally {
            deleteFolder(part)
        }
    }

    /** A folder of this name that doesn't exist yet, with a number if need be. */
    private fun freeName(wanted: String): File {
        val name = wanted.filter { it.isLetterOrDigit() || it in "-_.+ " }.trim(' ', '.').take(80).ifEmpty { "bundle" }
        return (1..Int.MAX_VALUE).asSequence()
            .map { File(folder, if (it == 1) name else "$name ($it)") }
            .first { !it.exists() }
    }

    private companion object {
        const val PART = ".import-"
        const val DOWNLOAD = ".download-"
        const val STORAGE_RESERVE = 200_000_000L // for the system
    }
}
