package gemma.demo

import android.app.AlertDialog
import android.app.Dialog
import android.content.Intent
import android.view.View
import android.widget.EditText
import gemma.core.Conversation
import gemma.core.EXAMPLE_SCHEMA
import gemma.core.GemmaException
import gemma.core.Reply
import gemma.core.Role
import gemma.core.Schema
import gemma.core.StopReason
import gemma.core.askStructured
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.flow.flowOn
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext
import java.io.File

/** A chat with streaming text. Leaving the screen stops the reply; the conversation stays with the model. */
class ChatActivity : Screen() {
    private lateinit var question: EditText
    private var dialog: Dialog? = null

    override fun controls(): List<View> {
        question = EditText(this)
        use(application.schema)
        return listOf(
            question,
            row(button("Send", ::send), button("Stop", ::stop), button("New chat", ::reset)),
            row(button("Bundle", ::pickBundle), button("Schema", ::pickSchema), button("Benchmark", ::openBenchmark)),
        )
    }

    override fun onStart() {
        super.onStart()
        if (application.model == null) pickBundle() else if (log.text.isEmpty()) begin(::sayAgain)
    }

    override fun onStop() {
        dialog?.dismiss()
        super.onStop()
    }

    private fun pickBundle() {
        if (busy) return
        val folder = BundleFolder(this)
        val bundles = folder.bundles()
        if (bundles.isEmpty()) {
            status.text = folder.hint
            return
        }
        val names = bundles.map { it.name }.toTypedArray<CharSequence>()
        dialog = AlertDialog.Builder(this)
            .setTitle("Bundle")
            .setItems(names) { _, place -> load(bundles[place]) }
            .show()
    }

    /** A JSON Schema that answers have to match, or none. */
    private fun pickSchema() {
        val text = EditText(this).apply { setText(application.schema?.toString() ?: EXAMPLE_SCHEMA) }
        dialog = AlertDialog.Builder(this)
            .setTitle("Answers match this JSON Schema")
            .setView(text)
            .setPositiveButton("Use") { _, _ -> readSchema(text.text.toString()) }
            .setNegativeButton("Any answer") { _, _ -> use(null) }
            .show()
    }

    private fun use(schema: Schema?) {
        application.schema = schema
        question.hint = if (schema == null) "Ask something" else "Ask for JSON"
    }

    private fun readSchema(text: String) = try {
        use(Schema.parse(text))
    } catch (error: GemmaException) {
        say("\n⚠ ${error.message}\n")
    }

    private fun load(directory: File) = begin {
        log.text = ""
        status.text = "Checking ${directory.name} …"
        val task = currentCoroutineContext()
        onModelThread {
            application.unload()
            application.model = LoadedModel.load(directory, application.device) { share ->
                task.ensureActive()
                scope.launch { status.text = "Checking ${directory.name}: %.0f %%".format(100 * share) }
            }
        }
        sayAgain()
    }

    /** What was said with the model so far: after another screen, or when Android made this one anew. */
    private suspend fun sayAgain() {
        val model = application.model ?: return
        status.text = "${model.bundle.manifest.model.id} · ${application.device.memoryLine()}"
        for (message in onModelThread { model.conversation.messages }) {
            say(if (message.role == Role.ASSISTANT) "${message.content}\n" else "\n${message.content}\n\n")
        }
    }

    private fun send() {
        val talk = application.model?.conversation
        val text = question.text.toString()
        if (talk == null) say("\n⚠ Load a bundle first: tap Bundle.\n")
        if (busy || talk == null || text.isBlank()) return
        begin {
            say("\n$text\n\n")
            val schema = application.schema
            if (schema == null) show(onModelThread { talk.send(text) }) else askInSchema(talk, text, schema)
        }
    }

    private suspend fun askInSchema(talk: Conversation, text: String, schema: Schema) {
        val answer = onModelThread {
            askStructured(talk, text, schema) { reply -> withContext(MainThread) { show(reply) } }
        }
        say("\n${answer.inWords()}\n")
    }

    private suspend fun show(reply: Reply) {
        val meter = application.model?.meter ?: return
        question.text.clear() // now that the question fits
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
        say(if (reply.reason == StopReason.CONTEXT) "\n⚠ The context is full. Tap New chat to go on.\n" else "\n")
    }

    private fun reset() {
        val talk = application.model?.conversation ?: return
        stop()
        log.text = ""
        scope.launch { onModelThread { talk.reset() } }
    }

    private fun openBenchmark() {
        stop()
        startActivity(Intent(this, BenchmarkActivity::class.java))
    }
}
