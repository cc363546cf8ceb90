package gemma.core

import java.io.File
import java.io.FileOutputStream
import java.io.IOException
import java.io.InputStream

/**
 * Writes a bundle that comes from outside into a new folder. Its names and sizes are not trusted: no file lands outside,
 * none twice, and all of them together are at most `room` bytes, however small the archive was.
 */
internal class ImportedBundle(private val folder: File, private val room: Long, private val onBytes: (Long) -> Unit) {
    private val names = HashSet<String>()
    private var written = 0L

    fun add(name: String, content: InputStream) {
        val outside = !staysInside(name) || !isShort(name)
        if (outside) throw BundleException("the archive has a file \"${name.take(80)}\", which would be outside of the bundle; don't use it")
        if (!names.add(name.lowercase())) throw BundleException("the archive has $name twice; make it again")
        if (names.size > MAX_FILES) throw BundleException("the archive has more than $MAX_FILES files, so it is not a bundle")
        val file = File(folder, name)
        val parent = file.parentFile
        if (parent == null || !(parent.isDirectory || parent.mkdirs())) throw IOException("no folder for $name")
        FileOutputStream(file).use { copy(content, it) }
    }

    /** The folder with the manifest: this one, or the single folder in it. Removes what the manifest doesn't name. */
    fun finish(): File {
        val inner = folder.listFiles().orEmpty().singleOrNull { it.isDirectory }
        val bundle = listOfNotNull(folder, inner).firstOrNull { File(it, MANIFEST).isFile }
            ?: throw BundleException("there is no manifest.json in it, so it is not a bundle; choose the folder that gemma-export wrote")
        removeOthers(bundle, manifestOf(bundle))
        return bundle
    }

    private fun copy(content: InputStream, out: FileOutputStream) = readBlocks(content) { block, count ->
        written += count
        if (written > room) {
            throw BundleException("the bundle has more than the ${maxOf(0, room) / 1_000_000} MB that are free; delete other bundles")
        }
        out.write(block, 0, count)
        onBytes(written)
    }
}
