package gemma.demo

import android.app.Activity
import android.content.pm.ActivityInfo
import android.content.res.Configuration
import android.os.Bundle
import android.view.View
import android.widget.Button
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import gemma.core.messageFor
import gemma.core.shouldUnload
import gemma.core.threadsToUse
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Job
import kotlinx.coroutines.SupervisorJob
import kotlinx.coroutines.cancel
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext

/** The base of both screens: a page that scrolls, a status line, rows of buttons, and at most one running task. */
abstract class Screen : Activity() {
    protected val application: GemmaApplication get() = applicationContext as GemmaApplication
    protected val scope = CoroutineScope(MainThread + SupervisorJob())
    protected lateinit var status: TextView
    private lateinit var scroll: ScrollView

    /** The page, unless a screen has another. */
    protected val log: TextView by lazy {
        TextView(this).apply {
            setTextIsSelectable(true)
            textSize = 16f
            setPadding(dp(16), dp(16), dp(16), dp(16))
        }
    }
    private var task: Job? = null
    private lateinit var shownFor: Configuration

    protected val busy: Boolean get() = task?.isActive == true

    /** Whether no task runs, not even one that was stopped and saves what it has. */
    protected val isIdle: Boolean get() = task?.isCompleted != false

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        shownFor = Configuration(resources.configuration)
        status = TextView(this).apply { setPadding(dp(16), dp(4), dp(16), dp(4)) }
        scroll = ScrollView(this).apply { addView(paper()) }
        val page = LinearLayout(this).apply { orientation = LinearLayout.VERTICAL }
        page.addView(scroll, LinearLayout.LayoutParams(LinearLayout.LayoutParams.MATCH_PARENT, 0, 1f))
        page.addView(status)
        controls().forEach(page::addView)
        page.fitsSystemWindows = true // the system's bars lie over apps that don't ask for room
        setContentView(page)
        savedInstanceState?.let { state ->
            status.text = state.getString(STATUS)
            scroll.post { scroll.scrollTo(0, state.getInt(SCROLLED)) } // after the page was laid out
        }
    }

    override fun onSaveInstanceState(outState: Bundle) {
        super.onSaveInstanceState(outState)
        outState.putString(STATUS, status.text.toString())
        outState.putInt(SCROLLED, scroll.scrollY)
    }

    /** What a screen leaves to the one that is made after it, and nothing else has; null for nothing. */
    protected abstract val remains: Any?

    /** What the screen before has left; null if there was none. */
    protected val inherited: Any?
        @Suppress("DEPRECATION") // in favour of fragments, of which the app has none
        get() = lastNonConfigurationInstance

    @Suppress("OVERRIDE_DEPRECATION")
    final override fun onRetainNonConfigurationInstance(): Any? = remains

    /** The manifest keeps Android from making the screen anew by itself, because that would stop a reply. */
    override fun onConfigurationChanged(newConfig: Configuration) {
        super.onConfigurationChanged(newConfig)
        rebuildIfStale()
    }

    /** Makes the screen anew if its colours, sizes of text or sides are no longer the phone's; if a task runs, after it. */
    private fun rebuildIfStale() {
        if (isIdle && !isFinishing && (shownFor.diff(resources.configuration) and LOOKS) != 0) recreate()
    }

    override fun onStop() {
        stop() // Android kills apps that compute in the background
        super.onStop()
    }

    /** Frees an idle model. The chat is kept, and the model is loaded again with the next question. */
    override fun onTrimMemory(level: Int) {
        super.onTrimMemory(level)
        if (busy || application.model == null || !shouldUnload(level, application.device.freeMemory())) return
        tell("Memory was low, so the model was unloaded. It is loaded again when it is needed.")
        application.unloadSoon()
    }

    override fun onDestroy() {
        scope.cancel()
        super.onDestroy()
    }

    /** What scrolls above the status line. */
    protected open fun paper(): View = log

    /** The views below the page. */
    protected abstract fun controls(): List<View>

    /** Shows a message in the status line; screen readers say it when they have ended what they say. */
    fun tell(text: String) {
        status.accessibilityLiveRegion = View.ACCESSIBILITY_LIVE_REGION_POLITE
        status.text = text
    }

    /** Shows figures that change all the time: a screen reader that said them would never be silent. */
    internal fun tellQuietly(text: String) {
        status.accessibilityLiveRegion = View.ACCESSIBILITY_LIVE_REGION_NONE
        status.text = text
    }

    protected fun dp(value: Int): Int = dp(this, value)

    protected fun row(vararg views: View): View = LinearLayout(this).apply {
        views.forEach { addView(it, LinearLayout.LayoutParams(0, LinearLayout.LayoutParams.WRAP_CONTENT, 1f)) }
    }

    protected fun button(text: String, onClick: () -> Unit): Button = Button(this).apply {
        this.text = text
        setOnClickListener { onClick() }
    }

    protected open fun appendText(text: String) = follow { log.append(text) }

    /** Stays at the page's end, unless the user has scrolled up. `fullScroll` would take the focus from the input. */
    protected fun follow(change: () -> Unit) {
        val atEnd = !scroll.canScrollVertically(1)
        change()
        if (atEnd) scroll.post { scroll.scrollTo(0, scroll.getChildAt(0).height) }
    }

    /** Adds an error to the page. The status line has it too, instead of what failed, and screen readers say it. */
    protected fun warn(message: String?) {
        appendText("\n⚠ $message\n")
        tell("⚠ $message")
    }

    protected fun stop() {
        task?.cancel()
    }

    /** Starts a task unless one is running; after one that was stopped. Its errors appear on the page, and the display stays on while it runs. */
    protected fun startTask(work: suspend () -> Unit) {
        if (busy) return
        status.keepScreenOn = true
        val previous = task
        val started = scope.launch {
            try {
                previous?.join() // one that was stopped still saves what it has
                work()
            } catch (error: Throwable) { // also of a runtime's library: it must not end the app
                messageFor(error)?.let(::warn) ?: throw error
            }
        }
        task = started
        started.invokeOnCompletion { scope.launch { if (task === started) end() } }
    }

    private fun end() {
        status.keepScreenOn = false
        rebuildIfStale()
    }

    protected suspend fun <T> onModelThread(work: suspend () -> T): T = withContext(application.modelThread) { work() }

    /** The model, loaded first if need be; null if no bundle was chosen. */
    protected suspend fun loadedModel(): LoadedModel? {
        application.model?.let { return it }
        val directory = application.bundle ?: return null
        tell("Loading ${directory.name} …")
        val threads = threadsToUse(application.threads, application.device.cores)
        onModelThread {
            val task = currentCoroutineContext()
            application.model = LoadedModel.load(directory, threads, application.device, application.checked, cacheDir) { share ->
                task.ensureActive()
                scope.launch { tellQuietly("Checking ${directory.name}: %.0f %%".format(100 * share)) }
            }
        }
        return application.model?.also { showModel(it) }
    }

    protected fun showModel(model: LoadedModel) = tell("${model.bundle.manifest.model.id} · ${application.device.memoryLine()}")

    private companion object {
        const val STATUS = "status"
        const val SCROLLED = "scrolled"

        /** What the views were made with: they take their colours, sizes and sides only once. */
        const val LOOKS = ActivityInfo.CONFIG_UI_MODE or ActivityInfo.CONFIG_FONT_SCALE or
            ActivityInfo.CONFIG_LAYOUT_DIRECTION or ActivityInfo.CONFIG_LOCALE
    }
}
