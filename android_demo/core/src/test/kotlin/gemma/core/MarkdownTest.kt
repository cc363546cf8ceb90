package gemma.core

import java.io.File
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertTrue

class MarkdownTest {
    @Test
    fun `texts have the blocks that the shared cases list, whole and while they are written`() {
        val cases = json(File(DATA, "markdown_cases.json")).of("cases").list { case ->
            val text = case.of("text").string()
            assertEquals(case.of("blocks").list(::block), parseMarkdown(text, case.of("whole").boolean()), text)
        }
        assertTrue(cases.size > 40)
    }

    private fun block(json: JsonFields) = MarkdownBlock(
        MarkdownKind.valueOf(json.of("kind").string().uppercase()),
        json.of("spans").list { span ->
            val (look, text, link) = span.list { it.string() }
            MarkdownSpan(text, 'b' in look, 'i' in look, 'c' in look, link.ifEmpty { null })
        },
        level = json.orNull("level")?.count() ?: 0,
        depth = json.orNull("depth")?.count() ?: 0,
        quote = json.orNull("quote")?.count() ?: 0,
        marker = json.orNull("marker")?.string().orEmpty(),
    )

    /** With a step that looks back over all that was read, 100,000 markers take minutes. */
    @Test
    fun `long texts of markers alone are read in linear time`() {
        val start = System.nanoTime()
        for (marker in listOf("*a ", "**a* ", "_a__*", "[", "[a](", "[a](b ", "![", "`", "`a``", "<", "https://", "| a ", "> ", "- ")) {
            val text = marker.repeat(100_000 / marker.length)
            assertTrue(parseMarkdown(text).isNotEmpty() && parseMarkdown(text, isWhole = false).size <= 1)
        }
        assertTrue(System.nanoTime() - start < 60e9)
    }
}
