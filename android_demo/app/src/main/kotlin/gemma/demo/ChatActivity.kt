package gemma.demo

import android.app.AlertDialog
import android.app.Dialog
import android.content.Intent
import android.view.Menu
import android.view.View
import android.widget.EditText
import android.widget.ProgressBar
import gemma.core.EXAMPLE_SCHEMA
import gemma.core.GemmaException
import gemma.core.Reply
import gemma.core.Role
import gemma.core.SavedChat
import gemma.core.Schema
import gemma.core.StopReason
import gemma.core.Talk
import gemma.core.askStructured
import kotlinx.coroutines.NonCancellable
import kotlinx.coroutines.flow.flowOn
import kotlinx.coroutines.withContext
import java.io.File

/** A chat with streamed replies. Leaving the screen stops the reply; the chat is saved after each one. */
class ChatActivity : Screen() {
    private lateinit var question: EditText
    private lateinit var context: ProgressBar
    private var dialog: Dialog? = null
    private val bundles = BundleDialogs(this)

    override fun controls(): List<View> {
        question = EditText(this).apply { maxLines = 6 }
        context = ProgressBar(this, null, android.R.attr.progressBarStyleHorizontal)
        context.contentDescription = "Share of the context that the chat takes up"
        use(application.schema)
        return listOf(context, question, row(button("Send", ::send), button("Stop", ::stop), button("New chat", ::startNewChat)))
    }

    override fun onCreateOptionsMenu(menu: Menu): Boolean {
        val items = listOf<Pair<String, () -> Unit>>(
            "Bundles" to bundles::choose,
            "Chats" to ::chooseChat,
            "Settings" to ::editSettings,
            "Answer again" to ::answerAgain,
            "Schema" to ::editSchema,
            "Benchmark" to ::openBenchmark,
        )
        for ((title, act) in items) {
            menu.add(title).setOnMenuItemClickListener {
                if (!busy) act() else status.text = "Tap Stop first."
                true
            }
        }
        return true
    }

    override fun onStart() {
        super.onStart()
        if (log.text.isEmpty()) showChat()
    }

    /** Loads the last bundle. Results of other apps, such as a chosen archive, arrive before. */
    override fun onResume() {
        super.onResume()
        if (busy || application.model != null) return
        if (application.bundle == null) bundles.choose() else startTask { loadedModel() }
    }

    override fun onActivityResult(requestCode: Int, resultCode: Int, data: Intent?) {
        if (resultCode == RESULT_OK) data?.data?.let { bundles.import(requestCode, it) }
    }

    override fun onStop() {
        dialog?.dismiss()
        super.onStop()
    }

    /** Shows a dialog, which closes with the screen. */
    internal fun show(builder: AlertDialog.Builder) {
        dialog?.dismiss()
        dialog = builder.show()
    }

    internal fun load(bundle: File) = startTask { use(bundle) }

    /** Loads another bundle. The chat goes on with it. */
    internal suspend fun use(bundle: File) {
        application.bundle = bundle
        application.keep(application.chat.copy(bundle = bundle.name))
        onModelThread { application.unload() }
        loadedModel()
    }

    internal fun launchTask(work: suspend () -> Unit) = startTask(work)

    internal suspend fun <T> away(work: suspend () -> T): T = onModelThread(work)

    internal fun tell(text: String) {
        status.text = text
    }

    private fun showChat() {
        val chat = application.chat
        log.text = ""
        chat.messages.forEachIndexed { index, message ->
            if (index == chat.forgotten && index > 0) appendText("\n— the model has forgotten what is above —\n")
            appendText(if (message.role == Role.ASSISTANT) "${message.content}\n" else "\n${message.content}\n\n")
        }
    }

    private fun open(chat: SavedChat) {
        application.keep(chat)
        context.progress = 0
        showChat()
    }

    private fun startNewChat() {
        stop()
        startTask { open(application.newChat()) }
    }

    private fun send() {
        val text = question.text.toString()
        if (text.isNotBlank()) startTask { ask(text) }
    }

    /** The last question once more, with another reply. */
    private fun answerAgain() = startTask {
        val asked = application.chat.messages.lastOrNull { it.role == Role.USER } ?: return@startTask
        open(application.chat.withoutLast())
        ask(asked.content)
    }

    private suspend fun ask(text: String) {
        val model = loadedModel() ?: return warn("Choose a bundle first: tap Bundles in the menu.")
        val talk = onModelThread { model.talk(application.chat) }
        appendText("\n$text\n\n")
        try {
            val schema = application.schema
            if (schema == null) show(model, onModelThread { talk.conversation.send(text) }) else askForJson(model, talk, text, schema)
        } finally { // also of a reply that was stopped
            withContext(NonCancellable) { application.keep(onModelThread { talk.update(System.currentTimeMillis()) }) }
        }
    }

    private suspend fun askForJson(model: LoadedModel, talk: Talk, text: String, schema: Schema) {
        val answer = onModelThread {
            askStructured(talk.conversation, text, schema) { reply -> withContext(MainThread) { show(model, reply) } }
        }
        appendText("\n${answer.summary()}\n")
    }

    private suspend fun show(model: LoadedModel, reply: Reply) {
        val meter = model.meter
        question.text.clear() // only now, since the question was accepted
        if (reply.forgotten > 0) appendText("⚠ The context is full: forgot the oldest ${reply.forgotten} turns.\n\n")
        context.max = model.bundle.manifest.contextLength
        meter.start()
        reply.pieces.flowOn(application.modelThread).collect { piece ->
            meter.token()
            appendText(piece)
            showProgress(model, reply)
        }
        if (reply.thought.isNotEmpty()) appendText("\n\n(thought: ${reply.thought})")
        appendText(if (reply.reason == StopReason.CONTEXT) "\n⚠ The context is full. Start a new chat to go on.\n" else "\n")
        log.announceForAccessibility(reply.text)
    }

    private fun showProgress(model: LoadedModel, reply: Reply) {
        val latency = model.meter.latency()
        context.progress = reply.contextTokens
        status.text = "%s%d of %d tokens · %.1f tokens/s · first after %.0f ms · %s".format(
            if (reply.isThinking) "thinking · " else "",
            reply.contextTokens,
            context.max,
            latency.tokensPerSecond ?: 0.0,
            latency.firstTokenMs ?: 0.0,
            application.device.memoryLine(),
        )
    }

    private fun chooseChat() {
        val chats = application.chats.all()
        val damaged = application.chats.damaged()
        val titles = chats.map { it.title } + damaged.map { "damaged: $it" }
        val builder = AlertDialog.Builder(this).setTitle("Chats")
            .setItems(titles.toTypedArray<CharSequence>()) { _, index -> if (index < chats.size) chatActions(chats[index]) else delete(damaged[index - chats.size]) }
        show(if (titles.isEmpty()) builder.setMessage("No chat was saved yet.") else builder)
    }

    private fun chatActions(chat: SavedChat) = show(
        AlertDialog.Builder(this).setTitle(chat.title).setMessage("${chat.messages.size} turns, ${chat.bundle}")
            .setPositiveButton("Open") { _, _ -> startTask { open(chat) } }
            .setNegativeButton("Delete") { _, _ -> delete(chat.id) },
    )

    private fun delete(id: String) = startTask {
        application.chats.delete(id)
        if (id == application.chat.id) open(application.newChat())
    }

    private fun editSettings() {
        val model = application.model
        val dialog = SettingsDialog(this, application.chat.settings, model?.bundle?.manifest, model?.codec?.canThink ?: true)
        show(dialog.builder { settings -> startTask { application.keep(application.chat.copy(settings = settings)) } })
    }

    /** Lets the user enter a JSON Schema that answers must match, or none. */
    private fun editSchema() {
        val text = EditText(this).apply { setText(application.schema?.toString() ?: EXAMPLE_SCHEMA) }
        show(
            AlertDialog.Builder(this).setTitle("JSON Schema for answers").setView(text)
                .setPositiveButton("Use") { _, _ -> parseSchema(text.text.toString()) }
                .setNegativeButton("Any answer") { _, _ -> use(null) },
        )
    }

    private fun use(schema: Schema?) {
        application.schema = schema
        question.hint = if (schema == null) "Ask something" else "Ask for JSON"
    }

    private fun parseSchema(text: String) = try {
        use(Schema.parse(text))
    } catch (error: GemmaException) {
        warn(error.message)
    }

    private fun openBenchmark() = startActivity(Intent(this, BenchmarkActivity::class.java))
}
