package gemma.demo

import android.content.Context
import android.graphics.drawable.Drawable
import android.graphics.drawable.GradientDrawable
import android.util.TypedValue

internal fun dp(context: Context, value: Int): Int = Math.round(value * context.resources.displayMetrics.density)

/** A colour of the theme, which differs in dark mode. */
internal fun themeColor(context: Context, attribute: Int): Int {
    val value = TypedValue()
    context.theme.resolveAttribute(attribute, value, true)
    return if (value.resourceId != 0) context.getColor(value.resourceId) else value.data
}

/** The background of a message: a tint of the page's own, so that the theme's text stays readable on it. */
internal fun bubble(context: Context, attribute: Int): Drawable = GradientDrawable().apply {
    setCornerRadius(dp(context, 16).toFloat())
    setColor((themeColor(context, attribute) and RGB) or TINT)
}

private const val RGB = 0xFFFFFF
private const val TINT = 0x20 shl 24 // an eighth opaque
