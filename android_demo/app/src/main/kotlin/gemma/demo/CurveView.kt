package gemma.demo

import android.content.Context
import android.graphics.Canvas
import android.graphics.Paint
import android.graphics.Path
import android.util.TypedValue
import android.view.View
import gemma.core.Span

/** Draws the rate of a sustained benchmark over time, from 0, and below it the memory. */
internal class CurveView(context: Context, private val unit: Float, color: Int) : View(context) {
    private val line = Paint(Paint.ANTI_ALIAS_FLAG).apply {
        style = Paint.Style.STROKE
        strokeWidth = 2 * unit
        this.color = color
    }
    private val text = Paint(Paint.ANTI_ALIAS_FLAG).apply {
        textSize = TypedValue.applyDimension(TypedValue.COMPLEX_UNIT_SP, 12f, resources.displayMetrics)
        this.color = color
    }
    var spans = emptyList<Span>()
        private set
    private var seconds = 1.0

    /** Shows the spans so far of a run of some seconds. */
    fun show(spans: List<Span>, seconds: Double) {
        this.spans = spans
        this.seconds = maxOf(seconds, spans.lastOrNull()?.seconds ?: 1.0)
        visibility = if (spans.isEmpty()) GONE else VISIBLE
        spans.lastOrNull()?.let {
            contentDescription = "%.1f tokens per second after %.0f seconds, thermal status %s".format(it.tokensPerSecond, it.seconds, it.condition.thermal)
        }
        invalidate()
    }

    override fun onDraw(canvas: Canvas) {
        super.onDraw(canvas)
        val last = spans.lastOrNull() ?: return
        val half = height / 2f
        curve(canvas, 0f, half, "%.1f tokens/s · thermal: %s".format(last.tokensPerSecond, last.condition.thermal ?: "not told")) { it.tokensPerSecond }
        val bytes = last.condition.memoryBytes ?: return
        curve(canvas, half, half, "memory: %.0f MB".format(bytes / 1e6)) { it.condition.memoryBytes?.toDouble() ?: 0.0 }
    }

    private fun curve(canvas: Canvas, top: Float, room: Float, label: String, value: (Span) -> Double) {
        canvas.drawText(label, 8 * unit, top + 1.2f * text.textSize, text)
        val (head, foot) = top + 1.6f * text.textSize to top + room - 4 * unit
        val most = spans.maxOf(value).takeIf { it > 0 } ?: return
        val path = Path()
        spans.forEachIndexed { index, span ->
            val x = (8 * unit + (width - 16 * unit) * span.seconds / seconds).toFloat()
            val y = (foot - (foot - head) * value(span) / most).toFloat()
            if (index == 0) path.moveTo(x, y) else path.lineTo(x, y)
        }
        canvas.drawPath(path, line)
    }
}
