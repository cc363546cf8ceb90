package gemma.demo

import android.app.Application
import android.content.Context
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

/** Holds the model, which outlives the screens, and the only thread that may use it. */
class GemmaApplication : Application() {
    val modelThread: CoroutineDispatcher =
        Executors.newSingleThreadExecutor { Thread(it, "model") }.asCoroutineDispatcher()

    val device by lazy { Device(this) }

    /** Written on the model thread; other threads may check whether it is null. */
    @Volatile
    var model: LoadedModel? = null

    /** The schema that answers must match; null allows any answer. */
    var schema: Schema? = null

    /** Whether a chat forgets its oldest turns when the context is full. */
    var roll = false

    override fun attachBaseContext(base: Context) {
        super.attachBaseContext(base)
        disableTelemetry()
    }

    /** Frees the model; call it on the model thread. */
    fun unload() {
        model?.close()
        model = null
    }

    /** Frees the model when memory is low, even if the screen that received the warning is gone. */
    fun unloadSoon() {
        CoroutineScope(modelThread).launch { unload() }
    }
}

/** Runs coroutines on the main thread. */
object MainThread : CoroutineDispatcher() {
    private val handler = Handler(Looper.getMainLooper())

    override fun dispatch(context: CoroutineContext, block: Runnable) {
        handler.post(block)
    }
}
