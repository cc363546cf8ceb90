package gemma.demo

import android.app.AlertDialog
import android.content.Context
import android.widget.EditText
import gemma.core.EXAMPLE_TOOLS
import gemma.core.Json
import gemma.core.ToolCall
import gemma.core.builtInResult
import gemma.core.parseResult
import gemma.core.write
import java.util.Date
import java.util.TimeZone

/** The result of a call that the app answers itself; null for all others. */
internal fun builtIn(call: ToolCall): Json? = builtInResult(call, Date(), TimeZone.getDefault())

/** Lets the user enter the tools of a chat as JSON, or none. */
internal fun toolsDialog(context: Context, tools: String, onDone: (String) -> Unit): AlertDialog.Builder {
    val text = EditText(context).apply { setText(tools.ifBlank { EXAMPLE_TOOLS }) }
    return AlertDialog.Builder(context).setTitle("Tools that the model may call")
        .setMessage("Nothing is run: you are asked for the result of each call. The app answers current_time itself.")
        .setView(form(context, labelled("JSON schemas", text)))
        .setPositiveButton("Use") { _, _ -> onDone(text.text.toString()) }
        .setNegativeButton("No tools") { _, _ -> onDone("") }
}

/** Asks for the result of each call. */
internal fun resultsDialog(context: Context, calls: List<ToolCall>, onDone: (List<Json>) -> Unit): AlertDialog.Builder {
    val fields = calls.map { call ->
        EditText(context).apply {
            maxLines = 6
            setText(builtIn(call)?.write().orEmpty())
        }
    }
    val labels = calls.zip(fields) { call, field -> labelled("Result of ${call.summary}", field) }
    return AlertDialog.Builder(context).setTitle("The model calls tools")
        .setMessage("Give what each call returns, as JSON or text.")
        .setView(form(context, *labels.toTypedArray()))
        .setPositiveButton("Send") { _, _ -> onDone(fields.map { parseResult(it.text.toString()) }) }
        .setNegativeButton("Not now", null)
}
