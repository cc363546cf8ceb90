package gemma.core

/**
 * Numbers of at least 0 and below 1 for a [Sampler]: for a seed those of `gemma_runtime`, and so the same tokens.
 *
 * It is numpy's PCG64, PCG XSL RR 128/64 after a SeedSequence: https://www.pcg-random.org, NEP 19.
 */
class SeededNoise(seed: Long) : () -> Double {
    private val incrementHigh: Long
    private val incrementLow: Long
    private var high = 0L
    private var low = 0L

    init {
        if (seed < 0) throw SessionException("seed is $seed, expected 0 or more")
        val (a, b, c, d) = seedWords(seed)
        incrementHigh = (c shl 1) or (d ushr 63)
        incrementLow = (d shl 1) or 1
        add(incrementHigh, incrementLow)
        add(a, b)
        step()
    }

    override fun invoke(): Double {
        step()
        val bits = (high xor low).rotateRight((high ushr 58).toInt())
        return (bits ushr 11) * (1.0 / (1L shl 53))
    }

    /** state · multiplier + increment, in 128 bits. */
    private fun step() {
        val product = low * MULTIPLIER_LOW
        high = highProduct(low, MULTIPLIER_LOW) + high * MULTIPLIER_LOW + low * MULTIPLIER_HIGH
        low = product
        add(incrementHigh, incrementLow)
    }

    private fun add(otherHigh: Long, otherLow: Long) {
        low += otherLow
        val carry = if (low.toULong() < otherLow.toULong()) 1 else 0
        high += otherHigh + carry
    }
}

private const val MULTIPLIER_HIGH = 0x2360ED051FC65DA4L
private const val MULTIPLIER_LOW = 0x4385DF649FCCF645L
private const val HALF = 0xFFFFFFFFL

/** The upper 64 bits of an unsigned product. */
private fun highProduct(a: Long, b: Long): Long {
    val (aHigh, aLow) = (a ushr 32) to (a and HALF)
    val (bHigh, bLow) = (b ushr 32) to (b and HALF)
    val middle = aHigh * bLow + (aLow * bLow ushr 32)
    val other = aLow * bHigh + (middle and HALF)
    return aHigh * bHigh + (middle ushr 32) + (other ushr 32)
}

/** Four words of 64 bits from a seed. */
private fun seedWords(seed: Long): LongArray {
    var constant = 0x43B0D7E5
    fun hashed(word: Int): Int {
        var value = word xor constant
        constant *= 0x931E8875.toInt()
        value *= constant
        return value xor (value ushr 16)
    }
    fun mixed(x: Int, y: Int): Int {
        val value = x * 0xCA01F9DD.toInt() - y * 0x4973F715
        return value xor (value ushr 16)
    }
    val pool = intArrayOf(seed.toInt(), (seed ushr 32).toInt(), 0, 0).map(::hashed).toIntArray()
    for (source in pool.indices) for (target in pool.indices) {
        if (source != target) pool[target] = mixed(pool[target], hashed(pool[source]))
    }
    constant = 0x8B51F9DD.toInt()
    val halves = LongArray(8) { index ->
        var value = pool[index % 4] xor constant
        constant *= 0x58F38DED
        value *= constant
        (value xor (value ushr 16)).toLong() and HALF
    }
    return LongArray(4) { halves[2 * it] or (halves[2 * it + 1] shl 32) }
}
