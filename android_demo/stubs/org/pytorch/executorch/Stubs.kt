// What the app calls of org.pytorch:executorch-android, for type checks where the library can't be had.
// Written from its sources as read: a check against our reading, not against the library. Gradle never sees it.
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
