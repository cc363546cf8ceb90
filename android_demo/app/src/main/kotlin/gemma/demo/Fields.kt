package gemma.demo

import android.app.AlertDialog
import android.content.Context
import android.view.View
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import gemma.core.GemmaException

/** A field below its name. A hint would vanish when the field is filled; screen readers say the name with the field. */
internal fun labelled(name: String, field: View): View {
    field.id = View.generateViewId() // the label refers to it
    val label = TextView(field.context).apply {
        text = name
        labelFor = field.id
    }
    return column(field.context, listOf(label, field)).apply { setPaddingRelative(0, dp(context, 8), 0, 0) }
}

/** The fields of a dialog, which scroll. */
internal fun form(context: Context, vararg fields: View): View = ScrollView(context).apply {
    addView(column(context, fields.asList()).apply { setPaddingRelative(dp(context, 24), dp(context, 8), dp(context, 24), 0) })
}

/** A dialog whose button `name` closes it only if `accept` takes what was entered; if it is refused, the dialog says why. */
internal fun checkedDialog(builder: AlertDialog.Builder, fields: View, name: String, problem: String? = null, accept: () -> Unit): AlertDialog {
    val context = builder.context
    val reason = TextView(context).apply {
        accessibilityLiveRegion = View.ACCESSIBILITY_LIVE_REGION_POLITE
        setPaddingRelative(dp(context, 24), dp(context, 8), dp(context, 24), 0)
    }
    fun say(problem: String?) {
        reason.visibility = if (problem == null) View.GONE else View.VISIBLE
        reason.text = problem?.let { "⚠ $it" }
    }
    say(problem)
    val dialog = builder.setView(column(context, listOf(reason, fields))).setPositiveButton(name, null).create()
    dialog.setOnShowListener { // only now it has the button, whose listener would else close it in any case
        dialog.getButton(AlertDialog.BUTTON_POSITIVE).setOnClickListener {
            try {
                accept()
                dialog.dismiss()
            } catch (error: GemmaException) {
                say(error.message)
            }
        }
    }
    return dialog
}

private fun column(context: Context, views: List<View>) = LinearLayout(context).apply {
    orientation = LinearLayout.VERTICAL
    views.forEach(this::addView)
}
