package gemma.demo

import android.app.Application
import android.os.Handler
import android.os.Looper
import kotlinx.coroutines.CoroutineDispatcher
import kotlinx.coroutines.Runnable
import kotlinx.coroutines.asCoroutineDispatcher
import java.util.concurrent.Executors
import kotlin.coroutines.CoroutineContext

/** Holds the one model, which outlives screens, and the one thread that may touch it. */
class GemmaApplication : Application() {
    val modelThread: CoroutineDispatcher =
        Executors.newSingleThreadExecutor { Thread(it, "model") }.asCoroutineDispatcher()

    val device by lazy { Device(this) }

    /** Written and read on the model thread. */
    var model: LoadedModel? = null

    /** Frees the model: what Android asks for before it kills the app. */
    fun unload() {
        model?.close()
        model = null
    }
}

/** The main thread, for coroutines. */
object MainThread : CoroutineDispatcher() {
    private val handler = Handler(Looper.getMainLooper())

    override fun dispatch(context: CoroutineContext, block: Runnable) {
        handler.post(block)
    }
}
