package gemma.demo

import android.graphics.Typeface
import android.text.SpannableStringBuilder
import android.text.Spanned
import android.text.style.BackgroundColorSpan
import android.text.style.ClickableSpan
import android.text.style.LeadingMarginSpan
import android.text.style.QuoteSpan
import android.text.style.RelativeSizeSpan
import android.text.style.StyleSpan
import android.text.style.TypefaceSpan
import android.view.View
import gemma.core.MarkdownBlock
import gemma.core.MarkdownKind
import gemma.core.MarkdownSpan

/** Blocks as text with looks. `step` is a list's indent in pixels, `shade` the colour behind code; `open` gets a tapped address. */
internal class MarkdownText(private val step: Int, private val shade: Int, private val open: (String) -> Unit) {
    fun of(blocks: List<MarkdownBlock>): CharSequence {
        val text = SpannableStringBuilder()
        blocks.forEachIndexed { index, block ->
            val isListed = block.kind == MarkdownKind.ITEM && blocks.getOrNull(index - 1)?.kind == MarkdownKind.ITEM
            if (index > 0) text.append(if (isListed) "\n" else "\n\n")
            add(block, text)
        }
        return text
    }

    private fun add(block: MarkdownBlock, text: SpannableStringBuilder) {
        val start = text.length
        if (block.marker.isNotEmpty()) text.append("${block.marker} ")
        if (block.kind == MarkdownKind.RULE) text.append("———")
        block.spans.forEach { add(it, text) }
        fun style(what: Any) = text.setSpan(what, start, text.length, Spanned.SPAN_EXCLUSIVE_EXCLUSIVE)
        when (block.kind) {
            MarkdownKind.HEADING -> {
                style(StyleSpan(Typeface.BOLD))
                style(RelativeSizeSpan(SIZES.getOrElse(block.level - 1) { 1f }))
            }
            MarkdownKind.CODE, MarkdownKind.TABLE -> {
                style(TypefaceSpan("monospace"))
                style(BackgroundColorSpan(shade))
            }
            else -> Unit
        }
        val first = if (block.kind == MarkdownKind.ITEM) block.depth - 1 else block.depth
        if (block.depth > 0) style(LeadingMarginSpan.Standard(first * step, block.depth * step))
        repeat(block.quote) { style(QuoteSpan()) }
    }

    private fun add(span: MarkdownSpan, text: SpannableStringBuilder) {
        val start = text.length
        text.append(span.text)
        fun style(what: Any) = text.setSpan(what, start, text.length, Spanned.SPAN_EXCLUSIVE_EXCLUSIVE)
        if (span.isBold) style(StyleSpan(Typeface.BOLD))
        if (span.isItalic) style(StyleSpan(Typeface.ITALIC))
        if (span.isCode) style(TypefaceSpan("monospace"))
        span.link?.let { address ->
            style(object : ClickableSpan() {
                override fun onClick(view: View) = open(address)
            })
        }
    }

    private companion object {
        val SIZES = listOf(1.5f, 1.3f, 1.15f) // of headings, relative to text
    }
}
