package gemma.demo

import android.app.ActivityManager
import android.content.Context
import android.content.pm.ApplicationInfo
import android.os.BatteryManager
import android.os.Build
import android.os.PowerManager
import gemma.core.Condition
import gemma.core.FreeMemory
import gemma.core.residentBytes

/** The phone: its memory and processors, and what slows it down at the moment. */
class Device(private val context: Context) {
    private val manager = context.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager
    private val power = context.getSystemService(Context.POWER_SERVICE) as PowerManager
    private val battery = context.getSystemService(Context.BATTERY_SERVICE) as BatteryManager

    val memoryBytes: Long get() = memory().totalMem

    val cores: Int = Runtime.getRuntime().availableProcessors()

    fun freeMemory(): FreeMemory = memory().run { FreeMemory(lowMemory, availMem, threshold) }

    fun memoryLine(): String {
        val now = memory()
        val own = (residentBytes() ?: 0) / 1e6
        return "app %.0f MB · free %.0f MB%s".format(own, now.availMem / 1e6, if (now.lowMemory) " · LOW" else "")
    }

    fun describe(): Map<String, String> = mapOf(
        "manufacturer" to Build.MANUFACTURER,
        "model" to Build.MODEL,
        "hardware" to Build.HARDWARE,
        "android" to Build.VERSION.RELEASE,
        "abi" to Build.SUPPORTED_ABIS.first(),
        "memory_bytes" to memoryBytes.toString(),
        "cores" to cores.toString(),
        "app" to context.packageManager.getPackageInfo(context.packageName, 0).versionName.orEmpty(),
        "build" to if (context.applicationInfo.flags and ApplicationInfo.FLAG_DEBUGGABLE != 0) "debug" else "release",
    )

    /** What changes while it works; `moment` begins the names. */
    fun state(moment: String): Map<String, String> {
        val state = mutableMapOf(
            "${moment}_battery_percent" to battery.getIntProperty(BatteryManager.BATTERY_PROPERTY_CAPACITY).toString(),
            "${moment}_charging" to battery.isCharging.toString(),
            "${moment}_power_save" to power.isPowerSaveMode.toString(),
        )
        if (Build.VERSION.SDK_INT >= 29) state["${moment}_thermal_status"] = power.currentThermalStatus.toString()
        if (Build.VERSION.SDK_INT >= 30) state["${moment}_thermal_headroom"] = power.getThermalHeadroom(0).toString()
        return state
    }

    /** What is sampled during a long benchmark. */
    fun condition() = Condition(if (Build.VERSION.SDK_INT >= 29) THERMAL.getOrNull(power.currentThermalStatus) else null, residentBytes())

    private fun memory() = ActivityManager.MemoryInfo().also(manager::getMemoryInfo)

    private companion object {
        val THERMAL = listOf("none", "light", "moderate", "severe", "critical", "emergency", "shutdown") // in Android's order
    }
}
