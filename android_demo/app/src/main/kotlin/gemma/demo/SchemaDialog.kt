package gemma.demo

import android.app.AlertDialog
import android.content.Intent
import android.net.Uri
import android.os.Bundle
import android.view.View
import android.widget.Button
import android.widget.EditText
import android.widget.TextView
import gemma.core.AnswerFormat
import gemma.core.GemmaException
import gemma.core.GrammarFile

/** What the answers of a chat must be: JSON of a schema, of a compiled one, or both. */
internal class SchemaDialog(private val screen: ChatActivity) {
    private var schema = ""
    private var grammar: GrammarFile? = null
    private var isChoosing = false // a file, in another app: Android may end this one meanwhile

    fun edit(format: AnswerFormat) {
        schema = format.schemaText
        grammar = format.grammar
        show()
    }

    private fun show(problem: String? = null) {
        val text = EditText(screen).apply { setText(schema) }
        val fields = form(screen, labelled("JSON Schema, which the app checks", text), *heldTo())
        val builder = AlertDialog.Builder(screen).setTitle("Schema for answers")
            .setNegativeButton("Any answer") { _, _ -> screen.use(AnswerFormat()) }
            .setNeutralButton("Choose a file …") { _, _ ->
                schema = text.text.toString()
                choose()
            }
        screen.show(checkedDialog(builder, fields, "Use", problem) { screen.use(AnswerFormat.parse(text.text.toString(), grammar)) })
    }

    private fun choose() {
        isChoosing = pick(screen, Intent(Intent.ACTION_OPEN_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE).setType("*/*"), GRAMMAR)
        if (!isChoosing) show("This phone has no app to choose files with.")
    }

    /** Keeps what was entered until a file is chosen. */
    fun save(state: Bundle) {
        if (!isChoosing) return
        state.putString(SCHEMA, schema)
        grammar?.let { state.putString(NAME, it.name) }
        grammar?.let { state.putByteArray(TEXT, it.text.toByteArray()) } // half as large as a string: Android limits what it keeps
    }

    /** What `save` has kept. */
    fun restore(state: Bundle) {
        schema = state.getString(SCHEMA) ?: return
        isChoosing = true
        grammar = state.getString(NAME)?.let { name -> state.getByteArray(TEXT)?.let { GrammarFile(name, String(it)) } }
    }

    /** The name of the compiled schema, and a button that removes it. */
    private fun heldTo(): Array<View> {
        val file = grammar ?: return arrayOf(TextView(screen).apply { text = "A file of gemma-runtime compile-schema guarantees the format." })
        val name = TextView(screen).apply { text = "Held to ${file.name}" }
        val remove = Button(screen).apply { text = "Remove ${file.name}" }
        remove.setOnClickListener {
            grammar = null
            name.text = "Not held to ${file.name}"
            remove.visibility = View.GONE
        }
        return arrayOf(name, remove)
    }

    /** Takes the file that the user has chosen, if there is one, and shows the dialog again. */
    fun import(chosen: Uri?) {
        isChoosing = false
        if (chosen == null) show() else screen.launchTask { read(chosen) }
    }

    private suspend fun read(chosen: Uri) {
        val documents = Documents(screen.contentResolver)
        try {
            grammar = screen.away { documents.read(chosen) { GrammarFile.read(documents.name(chosen), it) } }
            if (schema == AnswerFormat().schemaText) schema = "" // the example, which is not about this file
            show()
        } catch (error: GemmaException) {
            show(error.message)
        }
    }

    companion object {
        const val GRAMMAR = 3
        private const val SCHEMA = "schema"
        private const val NAME = "grammar"
        private const val TEXT = "grammarText"
    }
}
