package gemma.core

/**
 * Guesses tokens that the model then checks together, in one run. A run of four tokens costs a model in memory little
 * more than one of one token.
 */
interface Drafter {
    /** At most `most` tokens that may follow `tokens`, which is all tokens so far. */
    fun draft(tokens: List<Int>, most: Int): List<Int>

    /** Called after every run: how many tokens were drafted, and how many were right. */
    fun judge(drafted: Int, accepted: Int)
}

/**
 * Guesses that a passage goes on as it did before, in the prompt or the text so far; as `draft.py` of the runtime, which
 * explains the numbers.
 *
 * Drafts are paid from saved runs, and from `LOSS` of each run, so that text without repetitions is not slowed by more.
 */
class PromptLookup : Drafter {
    private val follows = HashMap<List<Int>, Int>() // passage to the place of what follows it
    private var known = 0 // tokens that are in the index as ends of passages
    private var length = FIRST
    private var credit = FIRST * COST

    override fun draft(tokens: List<Int>, most: Int): List<Int> {
        val end = tokens.size
        index(tokens, end - 1)
        val count = minOf(most, length, (credit / COST + 1e-9).toInt())
        val place = if (count > 0) find(tokens, end) else null
        index(tokens, end)
        if (place == null) return emptyList()
        val period = end - place // a passage that runs into itself is repeated
        return List(count) { tokens[place + it % period] }
    }

    override fun judge(drafted: Int, accepted: Int) {
        credit = minOf(SAVED, credit + LOSS + accepted - drafted * COST)
        if (drafted > 0) length = if (accepted == drafted) minOf(MOST, 2 * length) else maxOf(2, accepted + 1)
    }

    private fun index(tokens: List<Int>, end: Int) {
        for (place in known + 1..end) {
            for (length in SHORTEST..minOf(LONGEST, place)) follows[tokens.subList(place - length, place).toList()] = place
        }
        known = maxOf(known, end)
    }

    private fun find(tokens: List<Int>, end: Int): Int? =
        (minOf(LONGEST, end) downTo SHORTEST).firstNotNullOfOrNull { follows[tokens.subList(end - it, end)] }

    private companion object {
        const val SHORTEST = 2 // tokens of a repeated passage
        const val LONGEST = 4
        const val COST = 0.3 // of a drafted token, in runs of one token
        const val LOSS = 0.03 // most of the runs that drafts may cost on text that they can't guess
        const val FIRST = 3 // tokens drafted at first, and at most
        const val MOST = 15
        const val SAVED = 8.0 // most saved runs that are remembered
    }
}
