package gemma.demo

import android.app.AlertDialog
import android.app.Dialog
import android.content.ActivityNotFoundException
import android.content.Intent
import android.net.Uri
import android.os.Bundle
import android.view.Menu
import android.view.View
import android.widget.EditText
import android.widget.ProgressBar
import gemma.core.AnswerFormat
import gemma.core.Json
import gemma.core.Reply
import gemma.core.Role
import gemma.core.SavedChat
import gemma.core.StopReason
import gemma.core.Talk
import gemma.core.answerBuiltIn
import gemma.core.askFormatted
import gemma.core.guarantee
import gemma.core.lastQuestion
import gemma.core.openCalls
import gemma.core.requestIn
import gemma.core.shownReply
import gemma.core.shownResult
import kotlinx.coroutines.NonCancellable
import kotlinx.coroutines.flow.flowOn
import kotlinx.coroutines.withContext
import java.io.File

/** A chat with streamed replies. Leaving the screen stops the reply; the chat is saved after each one. */
class ChatActivity : Screen(), MessageList.Actions {
    private val messages by lazy { MessageList(this, this) }
    private lateinit var question: EditText
    private lateinit var context: ProgressBar
    private var dialog: Dialog? = null
    private val bundles = BundleDialogs(this)
    private val schemas = SchemaDialog(this)
    private val dialogs = ChatDialogs(this)

    /** With notes and thoughts, which are nowhere else. */
    private class Page(val entries: List<MessageList.Entry>)

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        question.setText(savedInstanceState?.getString(QUESTION).orEmpty())
        savedInstanceState?.let(schemas::restore)
        (inherited as? Page)?.let { messages.show(it.entries) }
    }

    override fun onSaveInstanceState(outState: Bundle) {
        super.onSaveInstanceState(outState)
        outState.putString(QUESTION, question.text.toString())
        schemas.save(outState)
    }

    /** Nothing while a reply ends: the chat then has more of it than the screen. */
    override val remains: Any? get() = if (isIdle) Page(messages.entries) else null

    override fun paper(): View = messages.view

    override fun controls(): List<View> {
        question = EditText(this).apply { maxLines = 6 }
        context = ProgressBar(this, null, android.R.attr.progressBarStyleHorizontal)
        context.contentDescription = "Share of the context that the chat takes up"
        showHint()
        return listOf(context, question, row(button("Send", ::send), button("Stop", ::stop), button("New chat", ::startNewChat)))
    }

    override fun onCreateOptionsMenu(menu: Menu): Boolean {
        val items = listOf<Pair<String, () -> Unit>>(
            "Bundles" to bundles::choose,
            "Chats" to dialogs::chooseChat,
            "Settings" to ::editSettings,
            "Answer again" to ::answerAgain,
            "Give results" to ::giveResults,
            "Schema" to { schemas.edit(application.chat.settings.format) },
            "Tools" to dialogs::editTools,
            "Benchmark" to ::openBenchmark,
        )
        for ((title, act) in items) {
            menu.add(title).setOnMenuItemClickListener {
                if (areReady()) act()
                true
            }
        }
        return true
    }

    override fun onStart() {
        super.onStart()
        if (messages.isEmpty) showChat()
    }

    /** Loads the last bundle. Results of other apps, such as a chosen archive, arrive before. */
    override fun onResume() {
        super.onResume()
        if (busy || application.model != null) return
        if (application.bundle == null) bundles.choose() else startTask { loadedModel() }
    }

    override fun onActivityResult(requestCode: Int, resultCode: Int, data: Intent?) {
        val chosen = data?.data.takeIf { resultCode == RESULT_OK }
        if (requestCode == SchemaDialog.GRAMMAR) schemas.import(chosen) else chosen?.let { bundles.import(requestCode, it) }
    }

    override fun onStop() {
        dialog?.dismiss()
        super.onStop()
    }

    /** Shows a dialog, which closes with the screen. */
    override fun show(builder: AlertDialog.Builder) = show(builder.create())

    internal fun show(new: AlertDialog) {
        dialog?.dismiss()
        dialog = new
        new.show()
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

    /** The address is shown first, since the text of a link may say another. */
    override fun open(address: String) = show(
        AlertDialog.Builder(this).setTitle("Open this address in another app?").setMessage(address)
            .setPositiveButton("Open") { _, _ ->
                try {
                    startActivity(Intent(Intent.ACTION_VIEW, Uri.parse(address)))
                } catch (_: ActivityNotFoundException) {
                    tell("No app opens $address.")
                }
            }
            .setNegativeButton("Cancel", null),
    )

    override fun areReady(): Boolean {
        if (busy) tell("Tap Stop first.")
        return !busy
    }

    override fun appendText(text: String) = follow { messages.note(text.trim('\n')) }

    private fun showChat() {
        val chat = application.chat
        messages.clear()
        chat.messages.forEachIndexed { index, message ->
            if (index == chat.forgotten && index > 0) appendText("— the model has forgotten what is above —")
            when (message.role) {
                Role.ASSISTANT -> messages.answer(shownReply(message.content, message.toolCalls))
                Role.TOOL -> messages.note(shownResult(message))
                else -> messages.question(message.content, index)
            }
        }
    }

    internal fun open(chat: SavedChat) {
        application.keep(chat)
        context.progress = 0
        showHint()
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
    override fun answerAgain() {
        val place = lastQuestion(application.chat.messages) ?: return
        val text = questionAt(place)
        startTask { ask(text, place) }
    }

    override fun edit(place: Int) {
        val text = EditText(this).apply {
            setText(questionAt(place))
            maxLines = 6
        }
        show(
            AlertDialog.Builder(this).setTitle("Edit message").setMessage("The messages after it are removed.")
                .setView(form(this, labelled("Message", text)))
                .setPositiveButton("Send") { _, _ ->
                    val edited = text.text.toString()
                    if (edited.isNotBlank()) startTask { ask(edited, place) }
                }
                .setNegativeButton("Cancel", null),
        )
    }

    private fun questionAt(place: Int) = requestIn(application.chat.messages[place].content, application.chat.settings.format.schema)

    /** Asks in a place of the chat. If no answer begins, the chat is as before, and the text goes back to the input. */
    private suspend fun ask(text: String, place: Int = application.chat.messages.size) {
        application.chat.settings.conflict?.let { return warn(it) }
        val model = loadedModel() ?: return warn("Choose a bundle first: tap Bundles in the menu.")
        val talk = onModelThread { model.talk(application.chat) }
        val removed = messages.cut(place)
        follow { messages.question(text, place) }
        val replies = ArrayList<Reply>()
        suspend fun show(reply: Reply) {
            replies += reply
            if (question.text.toString() == text) question.text.clear() // only now, since it was accepted
            show(model, reply)
        }
        try {
            val outcome = onModelThread {
                askFormatted(talk.conversation, text, talk.chat.settings.format, place) { reply -> withContext(MainThread) { show(reply) } }
            }
            outcome?.let(::appendText)
            answerCalls(talk, ::show)
        } finally { // also of a reply that was stopped
            withContext(NonCancellable) {
                replies.lastOrNull()?.let { guarantee(talk.chat.settings.format, it) }?.let(::tell)
                application.keep(onModelThread { talk.update(System.currentTimeMillis()) })
                if (replies.none { it.hasBegun }) takeBack(text, place, removed)
            }
        }
        if (areResultsMissing()) giveResults()
    }

    private suspend fun answerCalls(talk: Talk, show: suspend (Reply) -> Unit) = onModelThread {
        answerBuiltIn(talk.conversation, ::builtIn) { reply -> withContext(MainThread) { show(reply) } }
    }

    override fun areResultsMissing(): Boolean = openCalls(application.chat.messages).isNotEmpty()

    /** Asks for the results of the last answer's calls. */
    override fun giveResults() {
        val calls = openCalls(application.chat.messages)
        if (calls.isEmpty()) tell("The last answer calls no tools.")
        else show(resultsDialog(this, calls, application.chat.settings.toolNames) { results -> startTask { send(results) } })
    }

    /** Gives the model the results of its calls. If no answer begins, the chat is as before. */
    private suspend fun send(results: List<Json>) {
        val model = loadedModel() ?: return warn("Choose a bundle first: tap Bundles in the menu.")
        val talk = onModelThread { model.talk(application.chat) }
        suspend fun show(reply: Reply) = show(model, reply)
        try {
            show(onModelThread { talk.conversation.sendResults(results) })
            answerCalls(talk, ::show)
        } finally { // also of a reply that was stopped
            withContext(NonCancellable) { application.keep(onModelThread { talk.update(System.currentTimeMillis()) }) }
        }
        if (areResultsMissing()) giveResults()
    }

    private fun takeBack(text: String, place: Int, removed: List<View>) {
        messages.restore(place, removed)
        if (question.text.isEmpty()) question.setText(text)
    }

    /** Shows a reply while it is written, below the results that it answers; one that doesn't begin leaves no trace, as in the chat. */
    private suspend fun show(model: LoadedModel, reply: Reply) {
        val meter = model.meter
        val rows = messages.rows
        if (reply.forgotten > 0) appendText("⚠ The context is full: forgot the oldest ${reply.forgotten} turns.")
        context.max = model.bundle.manifest.contextLength
        reply.results.forEach { appendText(shownResult(it)) }
        meter.start()
        val answer = messages.answer()
        try {
            reply.pieces.flowOn(application.modelThread).collect { piece ->
                meter.token()
                follow { answer.append(piece, reply) }
                showProgress(model, reply)
            }
        } finally { // also of a reply that was stopped: the flow has dropped what was on its way
            withContext(NonCancellable) {
                val whole = onModelThread { reply.text }
                follow { if (reply.hasBegun) answer.end(whole, reply) else messages.keepFirst(rows) }
            }
        }
        if (reply.reason == StopReason.CONTEXT) appendText("⚠ The context is full. Start a new chat to go on.")
    }

    private fun showProgress(model: LoadedModel, reply: Reply) {
        val latency = model.meter.latency()
        context.progress = reply.contextTokens
        tellQuietly(
            "%s%d of %d tokens · %.1f tokens/s · first after %.0f ms · %s".format(
                if (reply.isThinking) "thinking · " else "",
                reply.contextTokens,
                context.max,
                latency.tokensPerSecond ?: 0.0,
                latency.firstTokenMs ?: 0.0,
                application.device.memoryLine(),
            ),
        )
    }

    private fun editSettings() {
        val model = application.model
        val abilities = model?.let { Abilities(it.codec.canThink, it.session.scoresTogether) } ?: Abilities()
        val dialog = SettingsDialog(
            this, application.chat.settings, model?.bundle?.manifest, abilities, application.threads, application.device.cores,
        )
        show(
            dialog.create { settings, threads ->
                application.threads = threads
                startTask { application.keep(application.chat.copy(settings = settings)) }
            },
        )
    }

    internal fun use(format: AnswerFormat) = startTask {
        val chat = application.chat
        application.keep(chat.copy(settings = chat.settings.copy(format = format)))
        showHint()
    }

    private fun showHint() {
        question.hint = application.chat.settings.format.hint
    }

    private fun openBenchmark() = startActivity(Intent(this, BenchmarkActivity::class.java))

    private companion object {
        const val QUESTION = "question"
    }
}
