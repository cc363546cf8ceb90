package gemma.core

import kotlinx.coroutines.flow.takeWhile
import kotlinx.coroutines.flow.toList
import kotlinx.coroutines.runBlocking
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFalse
import kotlin.test.assertNull
import kotlin.test.assertTrue

class FoldedThoughtTest {
    /** The reply of a model that writes a text. */
    private fun replyOf(text: String): Reply {
        val codec = gemma4Codec()
        val said = codec.tokenizer.encodeTemplate(text).asList() + 5
        var next = 0
        return Conversation(ScriptedSession { said[next++] }, codec, Sampler(Sampling()), thinking = true).send("us")
    }

    @Test
    fun `a thought fills while it arrives, and stays as the user folds it`() = runBlocking {
        val reply = replyOf("<|channel>thought\nin the<channel|>user user")
        var thought = FoldedThought()
        assertFalse(thought.isShown)
        val seen = ArrayList<FoldedThought>()
        reply.pieces.collect {
            thought = thought.following(reply)
            seen += thought
            if (seen.size == 2) thought = thought.toggled()
        }
        assertEquals(listOf("▸ Thinking…", "Thinking…, folded", null), seen.first().run { listOf(line, description, body) })
        assertTrue(seen.all { it.isShown })
        assertTrue(seen.any { it.isWriting && it.body == "in" }, "$seen")
        seen.zipWithNext { earlier, later -> assertTrue(later.text.startsWith(earlier.text), "$seen") }
        assertEquals(FoldedThought("in the", isWriting = false, isUnfolded = true), seen.last())
        assertEquals(seen.last(), seen.last().ended(reply))
        assertEquals(listOf("▾ Thought", "Thought, unfolded", "in the"), thought.run { listOf(line, description, body) })
        assertNull(thought.toggled().body)
    }

    @Test
    fun `a thought that was stopped is no longer being written`() = runBlocking {
        val reply = replyOf("<|channel>thought\nin the<channel|>user")
        reply.pieces.takeWhile { reply.thought != "in" }.toList()
        assertTrue(reply.isThinking)
        val thought = FoldedThought().following(reply)
        assertTrue(thought.isWriting)
        assertEquals(FoldedThought("in"), thought.ended(reply))
    }

    @Test
    fun `an empty thought leaves no line`() = runBlocking {
        val reply = replyOf("<|channel>thought\n<channel|>user")
        var thought = FoldedThought()
        val wasShown = ArrayList<Boolean>()
        reply.pieces.collect {
            thought = thought.following(reply)
            wasShown += thought.isShown
        }
        assertEquals(listOf(true, false), listOf(wasShown.first(), wasShown.last()))
        assertFalse(thought.ended(reply).isShown)
    }

    /** The model is up to 64 tokens ahead of the screen. */
    @Test
    fun `a thought that was over before the screen looked is shown all the same`() = runBlocking {
        val reply = replyOf("<|channel>thought\nin the<channel|>user")
        reply.pieces.toList()
        assertEquals(FoldedThought("in the"), FoldedThought().following(reply))
    }
}
