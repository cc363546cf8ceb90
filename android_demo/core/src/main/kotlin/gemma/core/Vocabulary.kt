package gemma.core

import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.CharBuffer
import java.nio.charset.CharacterCodingException
import java.nio.charset.CodingErrorAction

internal enum class PieceKind { PIECE, ADDED, SPECIAL, RESERVED, BYTE }

/** The pieces of a compact tokenizer file; `compact_tokenizer.py` of the exporter documents the format. */
internal class Vocabulary(
    val pieces: Array<String>, // by id; empty for ids without a piece
    val ranks: IntArray, // of the merge that yields the piece; -1 if there is none
    val kinds: Array<PieceKind>,
    val byteTokens: IntArray, // (256); -1 for bytes without a token
) {
    val size: Int get() = pieces.size
    val ids: Map<String, Int> = HashMap<String, Int>(pieces.size * 2).also { ids ->
        pieces.forEachIndexed { id, piece ->
            if (piece.isNotEmpty() && ids.put(piece, id) != null) throw damaged("it has the piece \"$piece\" twice")
        }
    }
    val bytes: Map<Int, Int> = byteTokens.withIndex().filter { it.value >= 0 }.associate { it.value to it.index }

    fun isControl(token: Int): Boolean = kinds[token] == PieceKind.SPECIAL || kinds[token] == PieceKind.RESERVED

    companion object {
        /** Throws TokenizerException if the file is damaged or has an unknown version. */
        fun parse(file: ByteArray): Vocabulary {
            val buffer = ByteBuffer.wrap(file).order(ByteOrder.LITTLE_ENDIAN)
            val (count, textBytes) = readHeader(buffer)
            val byteTokens = IntArray(256) { buffer.int.also { if (it !in -1 until count) throw damaged("it has a byte token $it of $count") } }
            val ranks = IntArray(count) { buffer.int.also { if (it < -1) throw damaged("it has a rank $it") } }
            val lengths = IntArray(count) { buffer.short.toInt() and 0xFFFF }
            val kinds = Array(count) { kindOf(buffer.get().toInt()) }
            if (lengths.sumOf { it.toLong() } != textBytes.toLong()) throw damaged("the lengths of its pieces don't add up to its text")
            return Vocabulary(readPieces(file, buffer.position(), lengths), ranks, kinds, byteTokens)
        }
    }
}

private const val MAGIC = 0x4B4F5447 // "GTOK"
private const val VERSION = 1
private const val HEADER_BYTES = 16L + 256 * 4
private const val BYTES_PER_PIECE = 4L + 2 + 1

private fun damaged(what: String) =
    TokenizerException("the compact tokenizer file is damaged: $what; copy the bundle again or export the model again")

/** The number of ids and the bytes of text; throws unless they match the size of the file. */
private fun readHeader(buffer: ByteBuffer): Pair<Int, Int> {
    if (buffer.remaining() < HEADER_BYTES || buffer.int != MAGIC) throw damaged("it does not start with GTOK")
    val version = buffer.int
    if (version != VERSION) {
        throw TokenizerException(
            "the compact tokenizer file has version $version, this app reads $VERSION; export the model again",
        )
    }
    val count = buffer.int
    val textBytes = buffer.int
    val expected = HEADER_BYTES + count * BYTES_PER_PIECE + textBytes
    if (count < 0 || textBytes < 0 || expected != buffer.capacity().toLong()) {
        throw damaged("it has ${buffer.capacity()} bytes, its header says $expected")
    }
    return count to textBytes
}

private fun kindOf(number: Int): PieceKind {
    if (number !in PieceKind.entries.indices) throw damaged("it has a piece of the unknown kind $number")
    return PieceKind.entries[number]
}

private fun readPieces(file: ByteArray, start: Int, lengths: IntArray): Array<String> {
    checkUtf8(file, start)
    var at = start
    return Array(lengths.size) { id ->
        val length = lengths[id]
        if (length > 0 && file[at].toInt() and 0xC0 == 0x80) throw damaged("piece $id starts inside of a character")
        String(file, at, length, Charsets.UTF_8).also { at += length }
    }
}

private fun checkUtf8(file: ByteArray, start: Int) {
    val decoder = Charsets.UTF_8.newDecoder()
        .onMalformedInput(CodingErrorAction.REPORT)
        .onUnmappableCharacter(CodingErrorAction.REPORT)
    try {
        val text: CharBuffer = decoder.decode(ByteBuffer.wrap(file, start, file.size - start))
        text.clear()
    } catch (error: CharacterCodingException) {
        throw damaged("its text is not UTF-8 (${error.message})")
    }
}
