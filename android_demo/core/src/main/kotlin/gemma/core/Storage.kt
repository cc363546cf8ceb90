package gemma.core

import java.io.ByteArrayOutputStream
import java.io.File
import java.io.FileOutputStream
import java.io.IOException
import java.io.InputStream
import java.nio.file.Files

/** Replaces a file as a whole, so that it is never half written; throws StorageException. */
internal fun replaceText(file: File, text: String) {
    val part = File(file.path + ".part")
    try {
        file.parentFile?.mkdirs()
        FileOutputStream(part).use { stream ->
            stream.write(text.toByteArray(Charsets.UTF_8))
            stream.fd.sync()
        }
        if (!part.renameTo(file)) throw IOException("it can't be replaced")
    } catch (error: IOException) {
        part.delete()
        throw StorageException("${file.name} can't be written: ${error.message}; free some storage", error)
    }
}

/** Reads a stream to its end, block by block: the buffer, and how many of its bytes are the block. */
internal fun readBlocks(stream: InputStream, onBlock: (ByteArray, Int) -> Unit) {
    val block = ByteArray(1 shl 16)
    while (true) {
        val read = stream.read(block)
        if (read < 0) return
        onBlock(block, read)
    }
}

/** All bytes of a stream; null if there are more than `limit`. */
internal fun InputStream.readBytesUpTo(limit: Int): ByteArray? {
    val bytes = ByteArrayOutputStream()
    val block = ByteArray(1 shl 16)
    while (true) {
        val read = read(block)
        if (read < 0) return bytes.toByteArray()
        if (bytes.size() + read > limit) return null
        bytes.write(block, 0, read)
    }
}

/** Deletes a folder with its content; throws StorageException if something is left. Follows no link. */
internal fun deleteFolder(folder: File) {
    if (!Files.isSymbolicLink(folder.toPath())) folder.listFiles().orEmpty().forEach { if (it.isDirectory) deleteFolder(it) else it.delete() }
    if (!folder.delete() && folder.exists()) throw StorageException("${folder.name} can't be deleted; delete it by hand")
}
