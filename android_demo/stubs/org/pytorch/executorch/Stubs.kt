// The parts of org.pytorch:executorch-android that the app calls, for type checks without the library.
// Written by hand from the library's sources, so they may differ from it. Gradle does not use this file.
@file:Suppress("UNUSED_PARAMETER")

package org.pytorch.executorch

class Tensor private constructor() {
    fun getDataAsFloatArray(): FloatArray = error("a stub")

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

class Module private constructor() {
    fun forward(vararg inputs: EValue): Array<EValue> = error("a stub")

    fun destroy(): Unit = error("a stub")

    companion object {
        @JvmStatic
        fun load(path: String): Module = error("a stub")
    }
}
