package gemma.core

import kotlin.test.Test
import kotlin.test.assertEquals

class MemoryPressureTest {
    private val plenty = FreeMemory(isLow = false, availableBytes = 3_000_000_000, thresholdBytes = 200_000_000)
    private val levels = listOf(5, 10, 15, 20, 40, 60, 80)

    private fun unloadedAt(memory: FreeMemory) = levels.filter { shouldUnload(it, memory) }

    /** Android 14 calls with 40 for each app in the background, which unloaded the model each time that its user looked elsewhere. */
    @Test
    fun `an app that leaves the screen keeps its model while memory is free`() = assertEquals(listOf(15, 60, 80), unloadedAt(plenty))

    @Test
    fun `an app in the background frees its model where memory is scarce`() {
        val scarce = listOf(
            plenty.copy(isLow = true),
            plenty.copy(availableBytes = 399_999_999),
            plenty.copy(availableBytes = 0),
            plenty.copy(thresholdBytes = Long.MAX_VALUE),
        )
        for (memory in scarce) assertEquals(listOf(15, 20, 40, 60, 80), unloadedAt(memory), "$memory")
        assertEquals(listOf(15, 60, 80), unloadedAt(plenty.copy(availableBytes = 400_000_000)))
    }

    @Test
    fun `levels between those that Android has now count as the next lower one`() {
        val scarce = plenty.copy(isLow = true)
        assertEquals(listOf(false, true, true), listOf(12, 30, 70).map { shouldUnload(it, scarce) })
        assertEquals(listOf(false, false, true), listOf(12, 30, 70).map { shouldUnload(it, plenty) })
    }
}
