package gemma.demo

import android.app.AlertDialog
import android.app.Dialog
import android.content.Intent
import android.view.View
import android.widget.Button
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

/** A chat with streamed replies. Leaving the screen stops the reply; the conversation is kept with the model. */
class ChatActivity : Screen() {
    private lateinit var question: EditText
    private lateinit var whenFull: Button
    private var dialog: Dialog? = null

    override fun controls(): List<View> {
        question = EditText(this)
        use(application.schema)
        whenFull = button("") { setRoll(!application.roll) }
        setRoll(application.roll)
        return listOf(
            question,
            row(whenFull),
            row(button("Send", ::send), button("Stop", ::stop), button("New chat", ::reset)),
            row(button("Bundle", ::pickBundle), button("Schema", ::editSchema), button("Benchmark", ::openBenchmark)),
        )
    }

    override fun onStart() {
        super.onStart()
        if (application.model == null) pickBundle() else if (log.text.isEmpty()) startTask(::showConversation)
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
            .setItems(names) { _, index -> load(bundles[index]) }
            .show()
    }

    /** Lets the user enter a JSON Schema that answers must match, or none. */
    private fun editSchema() {
        val text = EditText(this).apply { setText(application.schema?.toString() ?: EXAMPLE_SCHEMA) }
        dialog = AlertDialog.Builder(this)
            .setTitle("JSON Schema for answers")
            .setView(text)
            .setPositiveButton("Use") { _, _ -> parseSchema(text.text.toString()) }
            .setNegativeButton("Any answer") { _, _ -> use(null) }
            .show()
    }

    private fun use(schema: Schema?) {
        application.schema = schema
        question.hint = if (schema == null) "Ask something" else "Ask for JSON"
    }

    private fun setRoll(roll: Boolean) {
        application.roll = roll
        whenFull.text = if (roll) "When the chat is full: forget the oldest turns" else "When the chat is full: stop"
    }

    private fun parseSchema(text: String) = try {
        use(Schema.parse(text))
    } catch (error: GemmaException) {
        appendText("\n⚠ ${error.message}\n")
    }

    private fun load(directory: File) = startTask {
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
        showConversation()
    }

    /** Shows the conversation so far: after another screen, or when Android has recreated this one. */
    private suspend fun showConversation() {
        val model = application.model ?: return
        status.text = "${model.bundle.manifest.model.id} · ${application.device.memoryLine()}"
        for (message in onModelThread { model.conversation.messages }) {
            appendText(if (message.role == Role.ASSISTANT) "${message.content}\n" else "\n${message.content}\n\n")
        }
    }

    private fun send() {
        val chat = application.model?.conversation
        val text = question.text.toString()
        if (chat == null) appendText("\n⚠ Load a bundle first: tap Bundle.\n")
        if (busy || chat == null || text.isBlank()) return
        startTask {
            appendText("\n$text\n\n")
            val schema = application.schema
            chat.roll = application.roll
            if (schema == null) show(onModelThread { chat.send(text) }) else askForJson(chat, text, schema)
        }
    }

    private suspend fun askForJson(chat: Conversation, text: String, schema: Schema) {
        val answer = onModelThread {
            askStructured(chat, text, schema) { reply -> withContext(MainThread) { show(reply) } }
        }
        appendText("\n${answer.summary()}\n")
    }

    private suspend fun show(reply: Reply) {
        val meter = application.model?.meter ?: return
        question.text.clear() // only now, since the question was accepted
        if (reply.forgotten > 0) appendText("⚠ The context is full: forgot the oldest ${reply.forgotten} turns.\n\n")
        meter.start()
        reply.pieces.flowOn(application.modelThread).collect { piece ->
            meter.token()
            appendText(piece)
            val latency = meter.latency()
            status.text = "%.1f tokens/s · first after %.0f ms · %s".format(
                latency.tokensPerSecond ?: 0.0,
                latency.firstTokenMs ?: 0.0,
                application.device.memoryLine(),
            )
        }
        appendText(if (reply.reason == StopReason.CONTEXT) "\n⚠ The context is full. Tap New chat to go on.\n" else "\n")
    }

    private fun reset() {
        val chat = application.model?.conversation ?: return
        stop()
        log.text = ""
        scope.launch { onModelThread { chat.reset() } }
    }

    private fun openBenchmark() {
        stop()
        startActivity(Intent(this, BenchmarkActivity::class.java))
    }
}
