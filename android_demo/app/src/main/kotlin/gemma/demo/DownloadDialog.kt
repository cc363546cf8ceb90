package gemma.demo

import android.app.AlertDialog
import android.widget.CheckBox
import android.widget.EditText
import gemma.core.HubAddress
import gemma.core.HubDownload
import gemma.core.UnfinishedDownload
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.awaitCancellation
import kotlinx.coroutines.coroutineScope
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.launch

/** Downloads bundles from the hub: only after a tap, and over mobile data only if the user ticks that. */
internal class DownloadDialog(private val screen: ChatActivity) {
    private val application get() = screen.applicationContext as GemmaApplication
    private val metered = CheckBox(screen).apply { text = "Also over mobile data" }

    /** Asks for an address. */
    fun ask() {
        val address = EditText(screen).apply { hint = "hub:OWNER/NAME" }
        screen.show(
            AlertDialog.Builder(screen).setTitle("Download from huggingface.co")
                .setView(form(screen, labelled("Address of the bundle", address), metered))
                .setNegativeButton("Cancel", null)
                .setPositiveButton("Download") { _, _ -> start(address.text.toString()) },
        )
    }

    /** Asks what to do with a download that has not ended. */
    fun describe(unfinished: UnfinishedDownload) = screen.show(
        AlertDialog.Builder(screen).setTitle(unfinished.address).setView(form(screen, metered))
            .setMessage("%.2f GB have arrived.".format(unfinished.bytes / 1e9))
            .setPositiveButton("Go on") { _, _ -> start(unfinished.address) }
            .setNegativeButton("Delete") { _, _ -> screen.launchTask { screen.away { application.library.discard(unfinished) } } },
    )

    private fun start(text: String) = screen.launchTask {
        val address = HubAddress.parse(text)
        val networks = Networks(screen)
        val isMeteredAllowed = metered.isChecked
        val download = HubDownload(application.library, { networks.connect(it, isMeteredAllowed) })
        screen.tell("Asking the hub for $address …")
        val bundle = coroutineScope {
            // Ends a connection on which nothing arrives. Android forbids that on the main thread.
            val watch = launch(Dispatchers.IO) {
                try {
                    awaitCancellation()
                } finally {
                    download.stop()
                }
            }
            screen.away { run(download, address) }.also { watch.cancel() }
        }
        screen.use(bundle)
    }

    private suspend fun run(download: HubDownload, address: HubAddress) = currentCoroutineContext().let { task ->
        var told = -TOLD_BYTES
        download.run(address, application.checked) { progress ->
            task.ensureActive()
            if (progress.doneBytes - told >= TOLD_BYTES) {
                told = progress.doneBytes
                screen.runOnUiThread { screen.tellQuietly("Downloaded %.2f of %.2f GB …".format(progress.doneBytes / 1e9, progress.totalBytes / 1e9)) }
            }
        }
    }

    private companion object {
        const val TOLD_BYTES = 5_000_000L
    }
}
