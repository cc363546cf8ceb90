package gemma.demo

import java.lang.management.BufferPoolMXBean
import java.lang.management.ManagementFactory
import java.nio.file.Files
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertTrue

class MappedMemoryTest {
    private fun used(pool: String): Long =
        ManagementFactory.getPlatformMXBeans(BufferPoolMXBean::class.java).single { it.name == pool }.memoryUsed

    /** Caches in direct buffers counted as Java heap, and had to fit into it. */
    @Test
    fun `mapped memory is zeroed, writable, direct, and takes neither heap nor storage`() {
        val folder = Files.createTempDirectory("memory").toFile()
        try {
            val direct = used("direct")
            val mapped = used("mapped")
            val size = 1 shl 30
            val memory = mapMemory(folder, size)
            assertEquals(direct, used("direct"))
            assertEquals(mapped + size, used("mapped"))
            assertEquals(emptyList(), folder.list().orEmpty().toList())
            assertTrue(memory.isDirect)
            assertEquals(0L, memory.getLong(size - 8))
            memory.putLong(size - 8, 42)
            assertEquals(42L, memory.getLong(size - 8))
            assertEquals(0L, mapMemory(folder, size).getLong(size - 8), "each mapping is its own")
        } finally {
            folder.delete()
        }
    }
}
