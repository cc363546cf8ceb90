package gemma.demo

import android.app.Application
import android.os.Handler
import android.os.Looper
import gemma.core.Schema
import kotlinx.coroutines.CoroutineDispatcher
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Runnable
import kotlinx.coroutines.asCoroutineDispatcher
import kotlinx.coroutines.launch
import java.util.concurrent.Executors
import kotlin.coroutines.CoroutineContext

/** Holds the one model, which outlives screens, and the one thread that may touch it. */
class GemmaApplication : Application() {
    val modelThread: CoroutineDispatcher =
        Executors.newSingleThreadExecutor { Thread(it, "model") }.asCoroutineDispatcher()

    val device by lazy { Device(this) }

    /** Written on the model thread; others may look whether it is there. */
    @Volatile
    var model: LoadedModel? = null

    /** What answers have to match, if anything. */
    var schema: Schema? = null

    /** Frees the model, on the model thread. */
    fun unload() {
        model?.close()
        model = null
    }

    /** What Android asks for before it kills the app; done also where the screen that heard it is gone. */
    fun unloadSoon() {
        CoroutineScope(modelThread).launch { unload() }
    }
}

/** The main thread, for coroutines. */
object MainThread : CoroutineDispatcher() {
    private val handler = Handler(Looper.getMainLooper())

    override fun dispatch(context: CoroutineContext, block: Runnable) {
        handler.post(block)
    }
}
