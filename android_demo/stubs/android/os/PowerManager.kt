// The parts of Android's PowerManager that the app calls, two of which are newer than the android.jar of the type check.
package android.os

class PowerManager private constructor() {
    val isPowerSaveMode: Boolean get() = error("a stub")

    val currentThermalStatus: Int get() = error("a stub") // API 29

    fun getThermalHeadroom(@Suppress("UNUSED_PARAMETER") forecastSeconds: Int): Float = error("a stub") // API 30
}
