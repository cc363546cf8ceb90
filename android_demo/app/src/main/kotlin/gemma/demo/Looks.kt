package gemma.demo

import android.content.Context
import android.util.TypedValue

internal fun dp(context: Context, value: Int): Int = Math.round(value * context.resources.displayMetrics.density)

/** A colour of the theme, which differs in dark mode. */
internal fun themeColor(context: Context, attribute: Int): Int {
    val value = TypedValue()
    context.theme.resolveAttribute(attribute, value, true)
    return if (value.resourceId != 0) context.getColor(value.resourceId) else value.data
}
