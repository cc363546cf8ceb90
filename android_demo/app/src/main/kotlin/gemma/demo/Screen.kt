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

/** What both screens share: a log of text, a status line, a row of buttons, and one task at a time. */
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
        if (!isShort(level) || application.model == null) return
        stop()
        say("\n⚠ Android asked for memory, so the model was unloaded. Tap Bundle in the chat to load it again.\n")
        application.unloadSoon()
    }

    override fun onDestroy() {
        scope.cancel()
        super.onDestroy()
    }

    /** What stands below the log. */
    protected abstract fun controls(): List<View>

    protected fun row(vararg views: View): View = LinearLayout(this).apply {
        views.forEach { addView(it, LinearLayout.LayoutParams(0, LinearLayout.LayoutParams.WRAP_CONTENT, 1f)) }
    }

    protected fun button(text: String, onClick: () -> Unit): Button = Button(this).apply {
        this.text = text
        setOnClickListener { onClick() }
    }

    protected fun say(text: String) {
        log.append(text)
        scroll.post { scroll.fullScroll(View.FOCUS_DOWN) }
    }

    protected fun stop() {
        task?.cancel()
    }

    /** Starts a task unless one runs; what is wrong is said in the log. The display stays on meanwhile. */
    protected fun begin(work: suspend () -> Unit) {
        if (busy) return
        log.keepScreenOn = true
        val begun = scope.launch {
            try {
                work()
            } catch (error: GemmaException) {
                say("\n⚠ ${error.message}\n")
            }
        }
        task = begun
        begun.invokeOnCompletion { scope.launch { if (task === begun) log.keepScreenOn = false } }
    }

    protected suspend fun <T> onModelThread(work: suspend () -> T): T = withContext(application.modelThread) { work() }
}

/** From Android 14 on the system tells apps in the background alone, and early: the model is what they hold. */
private fun isShort(level: Int): Boolean {
    val background = if (Build.VERSION.SDK_INT >= 34) ComponentCallbacks2.TRIM_MEMORY_BACKGROUND else ComponentCallbacks2.TRIM_MEMORY_MODERATE
    return level == ComponentCallbacks2.TRIM_MEMORY_RUNNING_CRITICAL || level >= background
}
