package gemma.demo

import android.app.AlertDialog
import android.content.Intent
import android.net.Uri
import gemma.core.BundleException
import gemma.core.GemmaException
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.ensureActive
import java.io.File
import java.io.IOException

/** Choosing, adding and deleting bundles. */
internal class BundleDialogs(private val screen: ChatActivity) {
    private val application get() = screen.applicationContext as GemmaApplication

    /** The bundles on the phone, and ways to get one in. */
    fun choose() {
        val bundles = application.library.bundles()
        val unfinished = application.library.unfinished()
        val actions = listOf<Pair<String, () -> Unit>>(
            "Download from the hub …" to { DownloadDialog(screen).ask() },
            "Add from a zip file …" to { pick(screen, Intent(Intent.ACTION_OPEN_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE).setType("*/*"), ZIP) },
            "Add from a folder …" to { pick(screen, Intent(Intent.ACTION_OPEN_DOCUMENT_TREE), FOLDER) },
        )
        val choices = bundles.map { bundle -> bundle.name to { describe(bundle) } } +
            unfinished.map { download -> "Unfinished: ${download.address}" to { DownloadDialog(screen).describe(download) } } + actions
        screen.show(
            AlertDialog.Builder(screen).setTitle("Bundles").setItems(choices.map { it.first }.toTypedArray<CharSequence>()) { _, index -> choices[index].second() },
        )
        if (bundles.isEmpty()) screen.tell("There is no bundle yet. Download or add one, or run: adb push out/NAME ${application.bundleFolder.path}/")
    }

    private fun describe(bundle: File) {
        val text = try {
            val summary = application.library.summary(bundle)
            "%s\n%s for %s, %.2f GB".format(summary.model, summary.recipe, summary.target, summary.bytes / 1e9)
        } catch (error: GemmaException) {
            error.message
        }
        screen.show(
            AlertDialog.Builder(screen).setTitle(bundle.name).setMessage(text)
                .setPositiveButton("Load") { _, _ -> screen.load(bundle) }
                .setNegativeButton("Delete") { _, _ -> delete(bundle) },
        )
    }

    private fun delete(bundle: File) = screen.launchTask {
        if (application.bundle == bundle) application.bundle = null
        screen.away {
            if (application.model?.bundle?.directory == bundle) application.unload()
            application.library.delete(bundle)
        }
        screen.tell("${bundle.name} was deleted.")
    }

    /** Copies what the user has chosen into the app, checks it, and loads it. */
    fun import(request: Int, chosen: Uri) = screen.launchTask {
        val bundle = screen.away {
            val task = currentCoroutineContext()
            var told = 0L
            val onBytes = { bytes: Long ->
                task.ensureActive()
                if (bytes - told >= TOLD_BYTES) {
                    told = bytes
                    screen.runOnUiThread { screen.tellQuietly("Copied %.2f GB …".format(bytes / 1e9)) }
                }
            }
            val documents = Documents(screen.contentResolver)
            try {
                if (request == ZIP) {
                    application.library.importZip(documents.name(chosen).removeSuffix(".zip"), documents.open(chosen), application.checked, onBytes)
                } else {
                    val tree = documents.tree(chosen)
                    application.library.importFiles(tree.name, tree.files, application.checked, onBytes)
                }
            } catch (error: SecurityException) { // the other app has withdrawn its permission
                throw BundleException("the files can't be read: ${error.message}; choose them again", error)
            } catch (error: IOException) {
                throw BundleException("the files can't be read: ${error.message}; choose them again", error)
            }
        }
        screen.use(bundle)
    }

    private companion object {
        const val ZIP = 1
        const val FOLDER = 2
        const val TOLD_BYTES = 20_000_000L
    }
}
