package gemma.demo

import android.app.AlertDialog
import android.content.ComponentCallbacks2
import android.content.Intent
import android.view.View
import android.widget.EditText
import gemma.core.Conversation
import gemma.core.Reply
import gemma.core.Sampler
import gemma.core.Sampling
import gemma.core.StopReason
import kotlinx.coroutines.flow.flowOn
import kotlinx.coroutines.launch
import java.io.File

/** A chat with streaming text. Leaving the screen stops the reply; the conversation stays. */
class ChatActivity : Screen() {
    private var conversation: Conversation? = null
    private lateinit var question: EditText

    override fun controls(): List<View> {
        question = EditText(this).apply { hint = "Ask something" }
        return listOf(
            question,
            row(button("Send", ::send), button("Stop", ::stop), button("New chat", ::reset)),
            row(button("Bundle", ::pickBundle), button("Benchmark", ::openBenchmark)),
        )
    }

    override fun onStart() {
        super.onStart()
        if (conversation == null) pickBundle()
    }

    override fun onStop() {
        stop() // Android kills apps that compute in the background
        super.onStop()
    }

    override fun onTrimMemory(level: Int) {
        super.onTrimMemory(level)
        val critical = level == ComponentCallbacks2.TRIM_MEMORY_RUNNING_CRITICAL
        val pressed = critical || level >= ComponentCallbacks2.TRIM_MEMORY_MODERATE
        if (!pressed || conversation == null) return
        stop()
        conversation = null
        say("\n⚠ Memory is short, so the model was unloaded. Tap Bundle to load it again.\n")
        scope.launch { onModelThread { application.unload() } }
    }

    private fun pickBundle() {
        if (busy) return
        val folder = BundleFolder(this)
        val bundles = folder.bundles()
        if (bundles.isEmpty()) {
            status.text = folder.hint
            return
        }
        AlertDialog.Builder(this)
            .setTitle("Bundle")
            .setItems(bundles.map { it.name }.toTypedArray<CharSequence>()) { _, place -> load(bundles[place]) }
            .show()
    }

    private fun load(directory: File) = begin {
        conversation = null
        log.text = ""
        status.text = "Checking ${directory.name} …"
        val model = onModelThread {
            application.unload()
            LoadedModel.load(directory, application.device) { share ->
                scope.launch { status.text = "Checking ${directory.name}: %.0f %%".format(100 * share) }
            }.also { application.model = it }
        }
        conversation = onModelThread { Conversation(model.session, model.voice, Sampler(CHAT)) }
        status.text = "${model.bundle.manifest.model.id} · ${application.device.memoryLine()}"
    }

    private fun send() {
        val talk = conversation
        val text = question.text.toString()
        if (talk == null) say("\n⚠ Load a bundle first: tap Bundle.\n")
        if (busy || talk == null || text.isBlank()) return
        begin {
            val reply = onModelThread { talk.send(text) }
            question.text.clear()
            say("\n$text\n\n")
            stream(reply)
            say(ending(reply))
        }
    }

    private suspend fun stream(reply: Reply) {
        val meter = application.model?.meter ?: return
        meter.start()
        reply.pieces.flowOn(application.modelThread).collect { piece ->
            meter.token()
            say(piece)
            val latency = meter.latency()
            status.text = "%.1f tokens/s · first after %.0f ms · %s".format(
                latency.tokensPerSecond ?: 0.0,
                latency.firstTokenMillis ?: 0.0,
                application.device.memoryLine(),
            )
        }
    }

    private fun ending(reply: Reply): String = when (reply.reason) {
        StopReason.CONTEXT -> "\n⚠ The context is full. Tap New chat to go on.\n"
        else -> "\n"
    }

    private fun reset() {
        val talk = conversation ?: return
        stop()
        log.text = ""
        scope.launch { onModelThread { talk.reset() } }
    }

    private fun openBenchmark() {
        stop()
        startActivity(Intent(this, BenchmarkActivity::class.java))
    }

    private companion object {
        val CHAT = Sampling(temperature = 1.0, topK = 64, topP = 0.95) // what Gemma's authors advise
    }
}
