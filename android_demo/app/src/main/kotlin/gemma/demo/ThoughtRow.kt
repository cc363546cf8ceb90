package gemma.demo

import android.content.Context
import android.view.Gravity
import android.view.View
import android.widget.Button
import android.widget.LinearLayout
import android.widget.TextView
import gemma.core.FoldedThought

/** The line of a thought above its answer, and the text that a tap unfolds. */
internal class ThoughtRow(context: Context, private val text: TextView) {
    var thought = FoldedThought()
        private set
    private val line = Button(context, null, android.R.attr.borderlessButtonStyle).apply {
        setAllCaps(false)
        gravity = Gravity.START or Gravity.CENTER_VERTICAL
        setOnClickListener { show(thought.toggled()) }
    }
    val view = LinearLayout(context).apply {
        orientation = LinearLayout.VERTICAL
        visibility = View.GONE
        addView(line)
        addView(text.apply { visibility = View.GONE })
    }

    /** Changes only the views that look different: it is called for each token. */
    fun show(next: FoldedThought) {
        view.visibility = if (next.isShown) View.VISIBLE else View.GONE
        if (line.text.toString() != next.line) {
            line.text = next.line
            line.contentDescription = next.description
        }
        if (thought.body != next.body) {
            text.text = next.body
            text.visibility = if (next.body == null) View.GONE else View.VISIBLE
        }
        thought = next
    }
}
