package gemma.demo

import android.content.ActivityNotFoundException
import android.content.ContentResolver
import android.content.Intent
import android.net.Uri
import android.provider.DocumentsContract
import android.provider.DocumentsContract.Document
import gemma.core.StorageException
import java.io.FileNotFoundException
import java.io.IOException
import java.io.InputStream

/** A chosen folder: the path of each file in it, and how to open it. */
internal class DocumentTree(val name: String, val files: Map<String, () -> InputStream>)

/** Lets the user choose a file or folder of another app. */
internal fun pick(screen: Screen, intent: Intent, request: Int): Boolean = try {
    screen.startActivityForResult(intent, request)
    true
} catch (_: ActivityNotFoundException) {
    screen.tell("This phone has no app to choose files with; use adb push for bundles.")
    false
}

/** Files of other apps that the user has chosen. Nothing of what those apps say is trusted: the library checks it. */
internal class Documents(private val resolver: ContentResolver) {
    fun name(document: Uri): String = query(document).firstOrNull()?.name ?: "bundle"

    /** Throws FileNotFoundException. */
    fun open(document: Uri): InputStream = resolver.openInputStream(document) ?: throw FileNotFoundException("$document")

    /** Gives a document to its reader. Throws StorageException, and what the reader throws. */
    fun <T> read(document: Uri, reader: (InputStream) -> T): T = try {
        reader(open(document))
    } catch (error: SecurityException) { // the other app has withdrawn its permission
        throw unread(error)
    } catch (error: IOException) {
        throw unread(error)
    }

    private fun unread(error: Exception) = StorageException("the file can't be read: ${error.message}; choose it again", error)

    /** Replaces the content of a document. Throws StorageException. */
    fun write(document: Uri, content: ByteArray) = try {
        val stream = resolver.openOutputStream(document, "wt") ?: throw FileNotFoundException("$document")
        stream.use { it.write(content) }
    } catch (error: SecurityException) { // the other app has withdrawn its permission
        throw unwritten(error)
    } catch (error: IOException) {
        throw unwritten(error)
    }

    private fun unwritten(error: Exception) = StorageException("the file can't be saved: ${error.message}; choose another place", error)

    fun tree(tree: Uri): DocumentTree {
        val root = DocumentsContract.getTreeDocumentId(tree)
        val files = LinkedHashMap<String, () -> InputStream>()
        collect(tree, root, "", files, depth = 0)
        return DocumentTree(name(DocumentsContract.buildDocumentUriUsingTree(tree, root)), files)
    }

    private fun collect(tree: Uri, folder: String, path: String, files: MutableMap<String, () -> InputStream>, depth: Int) {
        if (depth > MAX_DEPTH || files.size > MAX_FILES) throw FileNotFoundException("the folder is too large to be a bundle")
        for (entry in query(DocumentsContract.buildChildDocumentsUriUsingTree(tree, folder))) {
            if (entry.isFolder) {
                collect(tree, entry.id, "$path${entry.name}/", files, depth + 1)
            } else {
                files["$path${entry.name}"] = { open(DocumentsContract.buildDocumentUriUsingTree(tree, entry.id)) }
            }
        }
    }

    private class Entry(val id: String, val name: String, val isFolder: Boolean)

    private fun query(uri: Uri): List<Entry> {
        val columns = arrayOf(Document.COLUMN_DOCUMENT_ID, Document.COLUMN_DISPLAY_NAME, Document.COLUMN_MIME_TYPE)
        val cursor = resolver.query(uri, columns, null, null, null) ?: return emptyList()
        return cursor.use { rows ->
            generateSequence { if (rows.moveToNext()) rows else null }
                .map { Entry(it.getString(0), it.getString(1).orEmpty(), it.getString(2) == Document.MIME_TYPE_DIR) }
                .toList()
        }
    }

    private companion object {
        const val MAX_DEPTH = 4
        const val MAX_FILES = 1000
    }
}
