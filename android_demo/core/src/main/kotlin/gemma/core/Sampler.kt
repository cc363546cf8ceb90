package gemma.core

/** How to choose a token. The defaults are greedy. The filters and their order are those of `gemma_runtime`. */
data class Sampling(
    val temperature: Double = 0.0, // 0 is greedy and ignores the filters below
    val topK: Int = 0, // keep the k most likely tokens; 0 keeps all
    val topP: Double = 1.0, // keep the fewest tokens that hold this share of probability
    val minP: Double = 0.0, // keep tokens at least this likely relative to the best
    val repetitionPenalty: Double = 1.0, // 1 is off
) {
    init {
        check("temperature", temperature, temperature >= 0 && temperature < Double.POSITIVE_INFINITY, "0 or more")
        check("top_k", topK, topK >= 0, "0 or more")
        check("top_p", topP, topP > 0 && topP <= 1, "more than 0 and at most 1")
        check("min_p", minP, minP in 0.0..1.0, "from 0 to 1")
        val penalty = repetitionPenalty
        val inRange = penalty >= LEAST_PENALTY && penalty <= Float.MAX_VALUE
        check("repetition_penalty", penalty, inRange, "a float32 above 0")
    }

    private fun check(name: String, value: Number, valid: Boolean, expected: String) {
        if (!valid) throw SessionException("$name is $value, expected $expected")
    }
}

private const val LEAST_PENALTY = 1.0 / (1L shl 62) / (1L shl 62) / 4 // 2^-126, the least normal float32

/** Chooses tokens. `noise` returns numbers of at least 0 and below 1: a [SeededNoise] always the same ones. */
class Sampler private constructor(private val sampling: Sampling, private val noise: () -> Double, private val seed: Int?) {
    constructor(sampling: Sampling, noise: () -> Double = java.util.Random()::nextDouble) : this(sampling, noise, null)

    /** With a seed, each reply draws the same numbers, those of `--seed`. */
    constructor(sampling: Sampling, seed: Int) : this(sampling, SeededNoise(seed.toLong()), seed)

    /** The sampler for another reply: with a seed, from its beginning. */
    internal fun forReply(): Sampler = if (seed == null) this else Sampler(sampling, seed)

    /**
     * Chooses a token from logits, (V); `previous` are the tokens so far, prompt included. Tokens that are not
     * `allowed` are dropped before any filter.
     */
    fun pick(logits: FloatArray, previous: List<Int>, allowed: ((Int) -> Boolean)? = null): Int {
        var penalized = penalize(logits, previous, sampling.repetitionPenalty)
        if (allowed != null) penalized = onlyAllowed(penalized, allowed)
        if (sampling.temperature == 0.0) return bestToken(penalized)
        val (tokens, shares) = candidates(penalized)
        val drawn = noise() * shares.sumInOrder()
        var sum = 0.0
        for (index in tokens.indices) {
            sum += shares[index]
            if (sum > drawn) return tokens[index]
        }
        return tokens.last()
    }

    /** The logits of the likeliest allowed tokens, as many as the filters look at; the others are minus infinity. */
    private fun onlyAllowed(logits: FloatArray, allowed: (Int) -> Boolean): FloatArray {
        val wanted = if (sampling.temperature == 0.0) 1 else sampling.topK
        var tried = if (wanted == 0) logits.size else maxOf(wanted, FIRST_TRIED)
        while (true) {
            val threshold = kthLargest(logits, tried)
            val kept = logits.indices.filter { logits[it] >= threshold && allowed(it) }
            if (kept.size >= maxOf(wanted, 1) || tried >= logits.size) return only(kept, logits)
            tried *= 16
        }
    }

    /** Tokens that may be drawn, and their probabilities relative to the best one's. */
    private fun candidates(logits: FloatArray): Pair<IntArray, DoubleArray> {
        val highest = logits[bestToken(logits)]
        val threshold = maxOf(kthLargest(logits, sampling.topK), -Float.MAX_VALUE) // -inf is not allowed
        var tokens = logits.indices.filter { logits[it] >= threshold }.toIntArray()
        var shares = DoubleArray(tokens.size) {
            Math.exp((logits[tokens[it]].toDouble() - highest) / sampling.temperature)
        }
        if (sampling.topP < 1) {
            val kept = nucleus(shares, sampling.topP)
            tokens = IntArray(kept.size) { tokens[kept[it]] }.also { _ ->
                shares = DoubleArray(kept.size) { shares[kept[it]] }
            }
        }
        if (sampling.minP == 0.0) return tokens to shares
        val likely = shares.indices.filter { shares[it] >= sampling.minP }
        return IntArray(likely.size) { tokens[likely[it]] } to DoubleArray(likely.size) { shares[likely[it]] }
    }
}

private const val FIRST_TRIED = 64 // the likeliest token that a JSON grammar allows is nearly always among these

private fun only(kept: List<Int>, logits: FloatArray): FloatArray {
    if (kept.isEmpty()) throw SessionException("the grammar allows none of the model's tokens here")
    val masked = FloatArray(logits.size) { Float.NEGATIVE_INFINITY }
    for (token in kept) masked[token] = logits[token]
    return masked
}

/** The token with the largest logit; throws SessionException if a logit is NaN or the largest is infinite. */
internal fun bestToken(logits: FloatArray): Int {
    var best = 0
    for (token in logits.indices) {
        if (logits[token] > logits[best] || logits[token].isNaN()) best = token
        if (logits[best].isNaN()) break
    }
    if (logits.isEmpty() || logits[best].isNaN() || logits[best].isInfinite()) {
        throw SessionException("the largest logit is not a finite number: the artifact overflows; run the benchmark on it")
    }
    return best
}

/** Lowers the logits of previous tokens, once per distinct token. */
private fun penalize(logits: FloatArray, previous: List<Int>, penalty: Double): FloatArray {
    if (penalty == 1.0 || previous.isEmpty()) return logits
    val penalized = logits.copyOf()
    val factor = penalty.toFloat()
    for (token in previous.toSet()) {
        if (token !in logits.indices) continue
        val score = logits[token]
        penalized[token] = if (score < 0) score * factor else score / factor
    }
    return penalized
}

/** The k-th largest logit; minus infinity for k = 0. More than k logits may reach it, by ties. */
internal fun kthLargest(logits: FloatArray, k: Int): Float {
    if (k == 0 || k >= logits.size) return Float.NEGATIVE_INFINITY
    // The largest so far, the smallest of them first. NaN counts as infinite: it has no order.
    val heap = FloatArray(k) { if (logits[it].isNaN()) Float.POSITIVE_INFINITY else logits[it] }
    for (root in k / 2 - 1 downTo 0) sink(heap, root)
    for (index in k until logits.size) {
        if (!(logits[index] > heap[0])) continue
        heap[0] = logits[index]
        sink(heap, 0)
    }
    return heap[0]
}

/** Moves a value down to where no value below it is smaller. */
private fun sink(heap: FloatArray, from: Int) {
    val value = heap[from]
    var at = from
    while (true) {
        var child = 2 * at + 1
        if (child >= heap.size) break
        if (child + 1 < heap.size && heap[child + 1] < heap[child]) child++
        if (value <= heap[child]) break
        heap[at] = heap[child]
        at = child
    }
    heap[at] = value
}

/** Indices of the smallest set of most likely tokens whose shares reach `topP` of the total; at least one. */
private fun nucleus(shares: DoubleArray, topP: Double): List<Int> {
    val total = shares.sumInOrder()
    // Tokens below this share can't be in the set: even all of them together are within the part left out. Sort only the rest.
    val rare = (1 - topP) * total / shares.size
    val common = shares.indices.filter { shares[it] >= rare }.sortedByDescending { shares[it] }
    var above = 0.0
    val kept = common.takeWhile { index -> (above < topP * total).also { above += shares[index] } }
    return kept.ifEmpty { common.take(1) }
}

private fun DoubleArray.sumInOrder(): Double = fold(0.0) { sum, share -> sum + share }
