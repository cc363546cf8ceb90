package gemma.core

/** The k largest logits at each of J judged positions, largest first. */
data class TopLogits(
    val ids: List<IntArray>, // (J, k)
    val logits: List<DoubleArray>, // (J, k)
    val logSumExp: DoubleArray, // (J), over the whole vocabulary
) {
    fun from(start: Int) = TopLogits(ids.drop(start), logits.drop(start), logSumExp.copyOfRange(start, logSumExp.size))
}

/** A prompt with expected logits: `reference` of the float32 weights, `quantized` of the bundle's codes. */
data class Golden(val name: String, val tokens: IntArray, val reference: TopLogits, val quantized: TopLogits) {
    /** How many positions, counted from the end, have expected logits. */
    val judged: Int get() = reference.ids.size
}

/** The goldens that the exporter wrote; throws BundleException if there are none. */
fun loadGoldens(bundle: Bundle): List<Golden> = parseGoldens(readText(bundle.path("goldens")))

internal fun parseGoldens(text: String): List<Golden> {
    val goldens = JsonFields.parse("goldens.json", text).list(::readGolden)
    if (goldens.isEmpty()) throw BundleException("the bundle has no goldens, so it can't be verified; export the model again")
    return goldens
}

private fun readGolden(json: JsonFields): Golden {
    val golden = Golden(
        name = json.of("name").string(),
        tokens = json.of("tokens").list { it.count() }.toIntArray(),
        reference = readTop(json.of("reference")),
        quantized = readTop(json.of("quantized")),
    )
    val consistent = golden.judged in 1..golden.tokens.size && golden.quantized.ids.size == golden.judged
    if (!consistent) throw json.wrong("the same number of positions in both references, at most one per token")
    return golden
}

private fun readTop(json: JsonFields): TopLogits {
    val top = TopLogits(
        ids = json.of("ids").list { row -> row.list { it.count() }.toIntArray() },
        logits = json.of("logits").list { row -> row.list { it.double() }.toDoubleArray() },
        logSumExp = json.of("log_sum_exp").list { it.double() }.toDoubleArray(),
    )
    val sameSizes = top.ids.map { it.size } == top.logits.map { it.size } && top.ids.all { it.isNotEmpty() }
    if (!sameSizes || top.ids.size != top.logSumExp.size) throw json.wrong("an id for each logit")
    return top
}

/** Reduces (T, V) logits to the k largest of each row and its normalizer. */
internal fun topLogits(rows: List<FloatArray>, k: Int = 32): TopLogits {
    val ids = rows.map { row ->
        val threshold = kthLargest(row, k)
        row.indices.filter { row[it] >= threshold }.sortedByDescending { row[it] }.take(k).toIntArray()
    }
    val logits = rows.zip(ids) { row, top -> DoubleArray(top.size) { row[top[it]].toDouble() } }
    return TopLogits(ids, logits, DoubleArray(rows.size) { logSumExp(rows[it]) })
}

internal fun logSumExp(row: FloatArray): Double {
    val highest = row.maxOf { it }.toDouble()
    return highest + Math.log(row.sumOf { Math.exp(it - highest) })
}
