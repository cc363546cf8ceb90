package gemma.demo

import android.content.Context
import android.view.View
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView

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

private fun column(context: Context, views: List<View>) = LinearLayout(context).apply {
    orientation = LinearLayout.VERTICAL
    views.forEach(this::addView)
}
