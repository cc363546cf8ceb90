package gemma.core

/** A way of sampling while it is edited: what the user wrote for each value. A blank text keeps the bundle's value. */
data class SamplingDraft(
    val temperature: String = "",
    val topK: String = "",
    val topP: String = "",
    val minP: String = "",
    val repetitionPenalty: String = "",
) {
    /** The values of `base` unless others were written; null if none was. Throws SessionException for no number, and for one out of range. */
    fun sampling(base: Sampling): Sampling? {
        if (listOf(temperature, topK, topP, minP, repetitionPenalty).all(String::isBlank)) return null
        return Sampling(
            temperature = number("temperature", temperature) ?: base.temperature,
            topK = whole("top_k", topK) ?: base.topK,
            topP = number("top_p", topP) ?: base.topP,
            minP = number("min_p", minP) ?: base.minP,
            repetitionPenalty = number("repetition_penalty", repetitionPenalty) ?: base.repetitionPenalty,
        )
    }
}

private fun whole(name: String, text: String): Int? {
    val value = number(name, text) ?: return null
    return value.toInt().also { if (it.toDouble() != value) refuse(name, text) }
}

private fun number(name: String, text: String): Double? {
    val given = text.trim().replace(',', '.').ifEmpty { return null }
    return given.toDoubleOrNull() ?: refuse(name, text)
}

private fun refuse(name: String, text: String): Nothing = throw SessionException("$name is \"${text.take(20)}\", expected a number")
