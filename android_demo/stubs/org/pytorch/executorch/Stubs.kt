// The parts of org.pytorch:executorch-android that the app calls, for type checks without the library.
// Copied by hand from its sources at release 1.4.1, which are Kotlin since 1.4. Gradle does not use this file.
@file:Suppress("UNUSED_PARAMETER")

package org.pytorch.executorch

abstract class Tensor internal constructor(shape: LongArray) {
    open val dataAsFloatArray: FloatArray get() = error("a stub")

    companion object {
        @JvmStatic
        fun fromBlob(data: LongArray, shape: LongArray): Tensor = error("a stub")
    }
}

class EValue private constructor() {
    fun toTensor(): Tensor = error("a stub")

    companion object {
        @JvmStatic
        fun from(tensor: Tensor): EValue = error("a stub")
    }
}

open class Module private constructor() {
    open fun forward(vararg inputs: EValue): Array<EValue> = error("a stub")

    open fun destroy(): Unit = error("a stub")

    companion object {
        const val LOAD_MODE_FILE = 0
        const val LOAD_MODE_MMAP = 1

        @JvmStatic
        @JvmOverloads
        fun load(modelPath: String?, loadMode: Int = LOAD_MODE_FILE, numThreads: Int = 0): Module = error("a stub")
    }
}
