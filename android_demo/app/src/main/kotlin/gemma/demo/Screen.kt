package gemma.demo

import android.app.Activity
import android.content.ComponentCallbacks2
import android.os.Build
import android.os.Bundle
import android.view.View
import android.widget.Button
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import gemma.core.GemmaException
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Job
import kotlinx.coroutines.SupervisorJob
import kotlinx.coroutines.cancel
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext

/** The base of both screens: a text log, a status line, rows of buttons, and at most one running task. */
abstract class Screen : Activity() {
    protected val application: GemmaApplication get() = applicationContext as GemmaApplication
    protected val scope = CoroutineScope(MainThread + SupervisorJob())
    protected lateinit var log: TextView
    protected lateinit var status: TextView
    private lateinit var scroll: ScrollView
    private var task: Job? = null

    protected val busy: Boolean get() = task?.isActive == true

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        log = TextView(this).apply {
            setTextIsSelectable(true)
            textSize = 16f
            setPadding(24, 24, 24, 24)
        }
        status = TextView(this).apply { setPadding(24, 8, 24, 8) }
        scroll = ScrollView(this).apply { addView(log) }
        val page = LinearLayout(this).apply { orientation = LinearLayout.VERTICAL }
        page.addView(scroll, LinearLayout.LayoutParams(LinearLayout.LayoutParams.MATCH_PARENT, 0, 1f))
        page.addView(status)
        controls().forEach(page::addView)
        page.fitsSystemWindows = true
        setContentView(page)
    }

    override fun onStop() {
        stop() // Android kills apps that compute in the background
        super.onStop()
    }

    override fun onTrimMemory(level: Int) {
        super.onTrimMemory(level)
        if (!isLowMemory(level) || application.model == null) return
        stop()
        appendText("\n⚠ Memory is low, so the model was unloaded. Tap Bundle in the chat to load it again.\n")
        application.unloadSoon()
    }

    override fun onDestroy() {
        scope.cancel()
        super.onDestroy()
    }

    /** The views below the log. */
    protected abstract fun controls(): List<View>

    protected fun row(vararg views: View): View = LinearLayout(this).apply {
        views.forEach { addView(it, LinearLayout.LayoutParams(0, LinearLayout.LayoutParams.WRAP_CONTENT, 1f)) }
    }

    protected fun button(text: String, onClick: () -> Unit): Button = Button(this).apply {
        this.text = text
        setOnClickListener { onClick() }
    }

    protected fun appendText(text: String) {
        log.append(text)
        scroll.post { scroll.fullScroll(View.FOCUS_DOWN) }
    }

    protected fun stop() {
        task?.cancel()
    }

    /** Starts a task unless one is running. Its errors appear in the log, and the display stays on while it runs. */
    protected fun startTask(work: suspend () -> Unit) {
        if (busy) return
        log.keepScreenOn = true
        val started = scope.launch {
            try {
                work()
            } catch (error: GemmaException) {
                appendText("\n⚠ ${error.message}\n")
            }
        }
        task = started
        started.invokeOnCompletion { scope.launch { if (task === started) log.keepScreenOn = false } }
    }

    protected suspend fun <T> onModelThread(work: suspend () -> T): T = withContext(application.modelThread) { work() }
}

/** Whether to free the model. Since Android 14 the system warns only apps in the background, and early. */
private fun isLowMemory(level: Int): Boolean {
    val background = if (Build.VERSION.SDK_INT >= 34) ComponentCallbacks2.TRIM_MEMORY_BACKGROUND else ComponentCallbacks2.TRIM_MEMORY_MODERATE
    return level == ComponentCallbacks2.TRIM_MEMORY_RUNNING_CRITICAL || level >= background
}
