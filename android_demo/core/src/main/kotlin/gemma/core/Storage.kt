package gemma.core

import java.io.File
import java.io.FileOutputStream
import java.io.IOException
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

/** Deletes a folder with its content; throws StorageException if something is left. Follows no link. */
internal fun deleteFolder(folder: File) {
    if (!Files.isSymbolicLink(folder.toPath())) folder.listFiles().orEmpty().forEach { if (it.isDirectory) deleteFolder(it) else it.delete() }
    if (!folder.delete() && folder.exists()) throw StorageException("${folder.name} can't be deleted; delete it by hand")
}
