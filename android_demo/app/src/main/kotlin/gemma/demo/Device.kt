package gemma.demo

import android.app.ActivityManager
import android.content.Context
import android.os.Build
import gemma.core.residentBytes

/** The phone's memory and processors. */
class Device(context: Context) {
    private val manager = context.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager

    val memoryBytes: Long get() = memory().totalMem

    /** The limit of Java's heap; on Android direct buffers count as heap. */
    val heapBytes: Long = Runtime.getRuntime().maxMemory()

    /** Half of the cores: the other half of a phone's cores are slow, and the fast ones would wait for them. */
    val threads: Int = maxOf(1, Runtime.getRuntime().availableProcessors() / 2)

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
        "memory_bytes" to memoryBytes.toString(),
        "threads" to threads.toString(),
    )

    private fun memory() = ActivityManager.MemoryInfo().also(manager::getMemoryInfo)
}
