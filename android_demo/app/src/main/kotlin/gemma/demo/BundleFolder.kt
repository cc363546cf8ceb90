package gemma.demo

import android.content.Context
import gemma.core.MANIFEST
import java.io.File

/** The folder for `adb push`: the app's own folder on shared storage, which needs no permission. */
class BundleFolder(context: Context) {
    private val folder: File = File(context.getExternalFilesDir(null) ?: context.filesDir, "bundles").also { it.mkdirs() }

    fun bundles(): List<File> = folder.listFiles().orEmpty().filter { File(it, MANIFEST).isFile }.sorted()

    val hint: String
        get() = "There is no bundle yet. Run on your computer:\n\nadb push out/NAME ${folder.path}/\n\nThen tap Bundle again."
}
