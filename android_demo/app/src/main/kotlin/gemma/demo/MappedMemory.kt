package gemma.demo

import java.io.File
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel

/**
 * Zeroed memory outside of Java's heap, in native byte order. Android counts direct buffers as heap, but no mappings.
 *
 * It is a private mapping of an empty file in `folder`, which is deleted at once: pages take memory when they are first
 * written, and none is ever written to storage.
 */
internal fun mapMemory(folder: File, bytes: Int): ByteBuffer {
    val file = File.createTempFile("memory", null, folder)
    try {
        return RandomAccessFile(file, "rw").use { opened ->
            opened.setLength(bytes.toLong())
            opened.channel.map(FileChannel.MapMode.PRIVATE, 0, bytes.toLong()).order(ByteOrder.nativeOrder())
        }
    } finally {
        file.delete()
    }
}
