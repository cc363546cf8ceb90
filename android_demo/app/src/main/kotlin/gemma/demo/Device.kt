package gemma.demo

import android.app.ActivityManager
import android.content.Context
import android.os.Build
import android.os.Debug

/** The phone, as far as a model cares. */
class Device(context: Context) {
    private val manager = context.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager

    val memoryBytes: Long get() = memory().totalMem

    /** Half the cores: on phones the others are slow ones, which the fast would wait for. */
    val threads: Int = maxOf(1, Runtime.getRuntime().availableProcessors() / 2)

    fun memoryLine(): String {
        val own = Debug.getNativeHeapAllocatedSize() / 1e6
        return "app %.0f MB · free %.0f MB%s".format(own, memory().availMem / 1e6, if (memory().lowMemory) " · LOW" else "")
    }

    fun describe(): Map<String, String> = mapOf(
        "manufacturer" to Build.MANUFACTURER,
        "model" to Build.MODEL,
        "hardware" to Build.HARDWARE,
        "android" to Build.VERSION.RELEASE,
        "memory_bytes" to memoryBytes.toString(),
        "threads" to threads.toString(),
    )

    private fun memory() = ActivityManager.MemoryInfo().also(manager::getMemoryInfo)
}
