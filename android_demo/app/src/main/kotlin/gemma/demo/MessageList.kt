package gemma.demo

import android.app.AlertDialog
import android.content.ClipData
import android.content.ClipboardManager
import android.content.Context
import android.text.TextUtils
import android.text.method.LinkMovementMethod
import android.view.Gravity
import android.view.View
import android.view.ViewGroup.LayoutParams.MATCH_PARENT
import android.view.ViewGroup.LayoutParams.WRAP_CONTENT
import android.view.accessibility.AccessibilityNodeInfo
import android.widget.Button
import android.widget.LinearLayout
import android.widget.TextView
import gemma.core.FoldedThought
import gemma.core.Reply
import gemma.core.parseMarkdown
import gemma.core.shownReply

/** The messages of a chat, each with a menu of what can be done with it, and notes between them. */
internal class MessageList(private val context: Context, private val actions: Actions) {
    /** What the screen does with messages; a place is an index in the chat. */
    interface Actions {
        /** Whether menus may be used now; tells the user if not. */
        fun areReady(): Boolean

        fun edit(place: Int)

        fun answerAgain()

        /** Whether the last answer waits for results of tools. */
        fun areResultsMissing(): Boolean

        fun giveResults()

        fun show(builder: AlertDialog.Builder)

        fun tell(text: String)

        /** Opens an address in another app. */
        fun open(address: String)
    }

    val view = LinearLayout(context).apply {
        orientation = LinearLayout.VERTICAL
        setPaddingRelative(dp(16), dp(16), dp(4), dp(16))
    }
    private val looks = MarkdownText(dp(20), highlight(), actions::open)

    /** Rows have tags: their entries, but answers, which still grow, themselves. */
    private val lastAnswer: Any? get() = (view.childCount - 1 downTo 0).map { view.getChildAt(it).tag }.firstOrNull { it is Answer }

    /** What a row shows, apart from its views. */
    sealed interface Entry {
        data class Question(val text: String, val place: Int) : Entry

        data class Reply(val text: String, val thought: FoldedThought) : Entry

        data class Note(val text: String) : Entry
    }

    val isEmpty: Boolean get() = view.childCount == 0

    /** All rows, for a list that takes over. */
    val entries: List<Entry> get() = (0 until view.childCount).map { view.getChildAt(it).tag }.map { (it as? Answer)?.entry ?: it as Entry }

    fun clear() = view.removeAllViews()

    fun show(entries: List<Entry>) = entries.forEach { entry ->
        when (entry) {
            is Entry.Question -> question(entry.text, entry.place)
            is Entry.Reply -> answer(entry.text, entry.thought)
            is Entry.Note -> note(entry.text)
        }
    }

    fun question(text: String, place: Int) {
        val shown = selectableText().apply {
            this.text = text
            background = bubble(context, android.R.attr.colorAccent)
        }
        val row = row(shown, Gravity.END, shown, "You", "your message") {
            listOf("Copy" to { copy(text) }, "Edit" to { actions.edit(place) })
        }
        add(row.apply { tag = Entry.Question(text, place) })
    }

    /** Adds a whole answer. */
    fun answer(text: String, thought: FoldedThought = FoldedThought()) = answer().show(text, thought)

    /** Adds an answer that is being written. */
    fun answer(): Answer {
        val thought = ThoughtRow(context, selectableText().apply { setTextColor(themeColor(context, android.R.attr.textColorSecondary)) })
        val answer = Answer(selectableText().apply { movementMethod = LinkMovementMethod.getInstance() }, thought, looks)
        val parts = LinearLayout(context).apply {
            orientation = LinearLayout.VERTICAL
            background = bubble(context, android.R.attr.textColorPrimary)
            addView(thought.view)
            addView(answer.shown)
        }
        val row = row(parts, Gravity.START, answer.shown, "Gemma", "the answer") {
            val last = listOf("Answer again" to actions::answerAgain).filter { answer === lastAnswer }
            val calls = listOf("Give results" to actions::giveResults).filter { answer === lastAnswer && actions.areResultsMissing() }
            listOf("Copy" to { copy(answer.text) }) + calls + last
        }
        add(row.apply { tag = answer })
        return answer
    }

    /** Adds what is nobody's message. */
    fun note(text: String) = add(
        selectableText().apply {
            this.text = text
            tag = Entry.Note(text)
        },
    )

    /** Takes away the question at a place and all that follows it, and returns these for `restore`. */
    fun cut(place: Int): List<View> {
        val start = (0 until view.childCount).firstOrNull { (view.getChildAt(it).tag as? Entry.Question)?.place == place } ?: view.childCount
        return (start until view.childCount).map(view::getChildAt).also { view.removeViews(start, it.size) }
    }

    val rows: Int get() = view.childCount

    /** Takes away all rows but the first ones. */
    fun keepFirst(rows: Int) = view.removeViews(rows, view.childCount - rows)

    /** Puts back what `cut` took away at a place, instead of what is there now. */
    fun restore(place: Int, removed: List<View>) {
        cut(place)
        removed.forEach(::add)
    }

    /** An answer on the screen, as markdown, below its thought. */
    class Answer internal constructor(internal val shown: TextView, private val thought: ThoughtRow, private val looks: MarkdownText) {
        private val received = StringBuilder()

        /** The text as the model wrote it. */
        val text: String get() = received.toString()

        internal val entry: Entry get() = Entry.Reply(text, thought.thought)

        /** Shows one more piece of a reply, or of its thought. */
        fun append(piece: String, reply: Reply) {
            thought.show(thought.thought.following(reply))
            received.append(piece)
            shown.text = looks.of(parseMarkdown(text, isWhole = false))
        }

        /** Shows the whole text of a reply that has ended. Screen readers say it: not before, or they would begin anew with each token. */
        fun end(whole: String, reply: Reply) {
            shown.accessibilityLiveRegion = View.ACCESSIBILITY_LIVE_REGION_POLITE
            show(shownReply(whole, reply.toolCalls), thought.thought.ended(reply))
        }

        internal fun show(whole: String, thought: FoldedThought) {
            this.thought.show(thought)
            received.setLength(0)
            received.append(whole)
            shown.text = looks.of(parseMarkdown(whole))
        }
    }

    private fun add(row: View) = view.addView(row, LinearLayout.LayoutParams(MATCH_PARENT, WRAP_CONTENT).apply { topMargin = dp(8) })

    /** A message at a side, beside the button of its menu. Screen readers say who wrote the text, and whose menu it is. */
    private fun row(
        message: View, side: Int, text: TextView, writer: String, name: String, items: () -> List<Pair<String, () -> Unit>>,
    ): View {
        text.setAccessibilityDelegate(object : View.AccessibilityDelegate() {
            override fun onInitializeAccessibilityNodeInfo(host: View, info: AccessibilityNodeInfo) {
                super.onInitializeAccessibilityNodeInfo(host, info)
                info.text = TextUtils.concat("$writer: ", text.text)
            }
        })
        val menu = Button(context, null, android.R.attr.borderlessButtonStyle).apply {
            this.text = "⋮"
            contentDescription = "Actions for $name"
            minimumWidth = dp(48)
            minWidth = dp(48)
            setOnClickListener { if (actions.areReady()) open(items()) }
        }
        val room = LinearLayout(context).apply {
            setGravity(side)
            addView(message, LinearLayout.LayoutParams(WRAP_CONTENT, WRAP_CONTENT))
        }
        return LinearLayout(context).apply {
            setGravity(Gravity.TOP)
            if (side == Gravity.END) setPaddingRelative(dp(32), 0, 0, 0) // a long question is still at its side
            addView(room, LinearLayout.LayoutParams(0, WRAP_CONTENT, 1f))
            addView(menu, LinearLayout.LayoutParams(WRAP_CONTENT, WRAP_CONTENT))
        }
    }

    private fun open(items: List<Pair<String, () -> Unit>>) = actions.show(
        AlertDialog.Builder(context).setItems(items.map { it.first }.toTypedArray<CharSequence>()) { _, index -> items[index].second() },
    )

    private fun copy(text: String) {
        val clipboard = context.getSystemService(Context.CLIPBOARD_SERVICE) as ClipboardManager
        clipboard.setPrimaryClip(ClipData.newPlainText("message", text))
        actions.tell("Copied.")
    }

    private fun selectableText() = TextView(context).apply {
        setTextIsSelectable(true)
        textSize = 16f
        setPaddingRelative(dp(12), dp(8), dp(12), dp(8))
    }

    private fun highlight(): Int = themeColor(context, android.R.attr.colorControlHighlight)

    private fun dp(value: Int): Int = dp(context, value)
}
