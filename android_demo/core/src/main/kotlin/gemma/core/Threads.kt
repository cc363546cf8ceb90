package gemma.core

/** The threads to compute with unless the user has chosen: half of the cores. The others of a phone's cores are slow, and the fast ones would wait for them. */
fun usualThreads(cores: Int): Int = maxOf(1, cores / 2)

/** What a user wrote as the number of threads; null for a blank text. Throws SessionException if it is not 1 to all cores. */
fun parseThreads(text: String, cores: Int): Int? {
    val given = text.trim().ifEmpty { return null }
    return given.toIntOrNull()?.takeIf { it in 1..cores }
        ?: throw SessionException("threads is \"${text.take(20)}\", expected 1 to $cores, or nothing for ${usualThreads(cores)}")
}

/** The threads to compute with: as chosen, or as usual if nothing was chosen or this phone has fewer cores. */
fun threadsToUse(chosen: Int?, cores: Int): Int = chosen?.takeIf { it in 1..cores } ?: usualThreads(cores)
