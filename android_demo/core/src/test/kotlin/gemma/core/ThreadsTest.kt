package gemma.core

import kotlin.test.Test
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

class ThreadsTest {
    @Test
    fun `half of the cores compute unless the user has chosen`() {
        assertEquals(listOf(1, 1, 1, 4), listOf(0, 1, 3, 8).map(::usualThreads))
        assertEquals(4, threadsToUse(null, 8))
        assertEquals(listOf(1, 8), listOf(1, 8).map { threadsToUse(it, 8) })
    }

    @Test
    fun `a choice that this phone can't follow is the usual one`() {
        for (chosen in listOf(0, -1, 9, Int.MIN_VALUE, Int.MAX_VALUE)) assertEquals(4, threadsToUse(chosen, 8))
    }

    @Test
    fun `what the user writes is 1 to all cores or nothing, and anything else is refused in one line`() {
        assertEquals(listOf(null, null, 1, 8), listOf("", "  ", "1", " 8 ").map { parseThreads(it, 8) })
        for (text in listOf("0", "9", "-1", "4.0", "99999999999", "all", "٣\u0000", "x".repeat(1000))) {
            val message = assertFailsWith<SessionException>(text) { parseThreads(text, 8) }.message.orEmpty()
            assertContains(message, "expected 1 to 8, or nothing for 4")
        }
    }
}
