package gemma.demo

import android.app.AlertDialog
import android.content.Context
import android.widget.EditText
import gemma.core.Json
import gemma.core.ToolCall
import gemma.core.builtInResult
import gemma.core.parseResult
import gemma.core.write
import java.util.Date
import java.util.TimeZone

/** The result of a call that the app answers itself; null for all others. */
internal fun builtIn(call: ToolCall): Json? = builtInResult(call, Date(), TimeZone.getDefault())

/** Asks for the result of each call; those of tools that the app answers itself are filled in. */
internal fun resultsDialog(context: Context, calls: List<ToolCall>, tools: Set<String>, onDone: (List<Json>) -> Unit): AlertDialog.Builder {
    val fields = calls.map { call ->
        EditText(context).apply {
            maxLines = 6
            setText(call.takeIf { it.name in tools }?.let(::builtIn)?.write().orEmpty())
        }
    }
    val labels = calls.zip(fields) { call, field -> labelled("Result of ${call.summary}", field) }
    return AlertDialog.Builder(context).setTitle("The model calls tools")
        .setMessage("Give what each call returns, as JSON or text.")
        .setView(form(context, *labels.toTypedArray()))
        .setPositiveButton("Send") { _, _ -> onDone(fields.map { parseResult(it.text.toString()) }) }
        .setNegativeButton("Not now", null)
}
