package gemma.demo

import android.content.ActivityNotFoundException
import android.content.Intent
import android.os.Bundle
import android.view.View
import android.widget.LinearLayout
import gemma.core.Agreement
import gemma.core.Benchmark
import gemma.core.SessionException
import gemma.core.Span
import gemma.core.Sustained
import gemma.core.Verification
import gemma.core.Workload
import gemma.core.measureSpeed
import gemma.core.measureSustained
import gemma.core.reportJson
import gemma.core.speedText
import gemma.core.verifyBundle
import gemma.core.write
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext
import java.io.File

/** Verifies the bundle against its goldens and measures its speed on this device; shares and saves the results as JSON. */
class BenchmarkActivity : Screen() {
    private var report: File? = null // of what was measured last
    private var results = Results()
    private lateinit var curve: CurveView

    /** What was measured since the screen was opened. */
    private data class Results(
        val model: LoadedModel? = null, // of which; another one begins anew
        val verification: Verification? = null,
        val benchmark: Benchmark? = null,
        val sustained: Sustained? = null,
    )

    private class Page(val text: String, val spans: List<Span>, val results: Results)

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        report = savedInstanceState?.getString(REPORT)?.let(::File)?.takeIf { it.isFile }
        (inherited as? Page)?.let { page ->
            log.text = page.text
            curve.show(page.spans, MINUTES * 60)
            results = page.results
        }
    }

    /** The process may end while the user chooses where to save. */
    override fun onSaveInstanceState(outState: Bundle) {
        super.onSaveInstanceState(outState)
        outState.putString(REPORT, report?.path)
    }

    override val remains: Any get() = Page(log.text.toString(), curve.spans, results)

    override fun controls(): List<View> {
        curve = CurveView(this, dp(1).toFloat(), status.currentTextColor).apply { visibility = View.GONE }
        curve.layoutParams = LinearLayout.LayoutParams(LinearLayout.LayoutParams.MATCH_PARENT, dp(160))
        return listOf(
            curve,
            row(button("Run", ::run), button("10 minutes", ::sustain), button("Stop", ::stop)),
            row(button("Save", ::save), button("Share", ::share)),
        )
    }

    private fun run() = startTask {
        report = null
        log.text = ""
        val model = loadedModel() ?: throw SessionException("no bundle was chosen; go back and choose one")
        val device = application.device
        val before = device.state("start")
        val verification = onModelThread { verify(model) }
        appendText(figures(verification))
        tell("measuring speed …")
        val benchmark = onModelThread { measure(model) }
        appendText("\n${speedText(model.loading, benchmark)}")
        keep(model, before) { it.copy(verification = verification, benchmark = benchmark) }
    }

    /** Decodes for ten minutes, and draws how fast. */
    private fun sustain() = startTask {
        log.text = ""
        val model = loadedModel() ?: throw SessionException("no bundle was chosen; go back and choose one")
        val before = application.device.state("start")
        val spans = ArrayList<Span>()
        val sustained = onModelThread { measureSustained(model) { span -> scope.launch { show(spans.also { it += span }) } } }
        appendText("first %.1f, last %.1f, lowest %.1f tokens/s\n".format(sustained.first, sustained.last, sustained.lowest))
        keep(model, before) { it.copy(sustained = sustained) }
    }

    private fun show(spans: List<Span>) {
        curve.show(spans, MINUTES * 60)
        tellQuietly("%.0f of %.0f seconds · %s".format(spans.last().seconds, MINUTES * 60, application.device.memoryLine()))
    }

    private suspend fun measureSustained(model: LoadedModel, onSpan: (Span) -> Unit): Sustained {
        val task = currentCoroutineContext()
        val manifest = model.bundle.manifest
        return measureSustained(
            model.session, manifest.vocabSize, Workload.of(manifest.contextLength), MINUTES,
            condition = application.device::condition, onSpan = onSpan, onStep = { task.ensureActive() },
        )
    }

    /** Adds results to those of the same model, and writes all of them into its report. */
    private fun keep(model: LoadedModel, before: Map<String, String>, add: (Results) -> Results) {
        val device = application.device
        results = add(if (results.model === model) results else Results(model))
        val session = model.session // which tells what it was loaded with, whatever was chosen since
        val about = device.describe() + ("runtime" to session.runtime) + ("threads" to session.threads.toString()) + before +
            device.state("end")
        val json = reportJson(
            about, model.bundle, results.verification, model.loading, results.benchmark, results.sustained, session.threads,
        )
        write(json.write(), model.bundle.directory.name)
    }

    private suspend fun verify(model: LoadedModel): Verification {
        val task = currentCoroutineContext()
        return verifyBundle(model.bundle, model.session, { task.ensureActive() }) { done, all ->
            scope.launch { tellQuietly("golden $done of $all") }
        }
    }

    private suspend fun measure(model: LoadedModel): Benchmark {
        val task = currentCoroutineContext()
        val manifest = model.bundle.manifest
        return measureSpeed(model.session, manifest.vocabSize, Workload.of(manifest.contextLength)) { task.ensureActive() }
    }

    /** Writes the report where `adb pull`, Save and Share find it. */
    private fun write(text: String, name: String) {
        val folder = File(getExternalFilesDir(null) ?: filesDir, "benchmarks").also { it.mkdirs() }
        val file = File(folder, "$name.json").also { it.writeText(text) }
        report = file
        tell("${application.device.memoryLine()}\nadb pull ${file.path}")
    }

    private fun share() {
        val file = finishedReport() ?: return
        val send = Intent(Intent.ACTION_SEND).setType("text/plain").putExtra(Intent.EXTRA_TEXT, file.readText())
        startActivity(Intent.createChooser(send, "Share the result"))
    }

    /** Asks where to save the report. */
    private fun save() {
        val file = finishedReport() ?: return
        val create = Intent(Intent.ACTION_CREATE_DOCUMENT).addCategory(Intent.CATEGORY_OPENABLE)
            .setType("application/json").putExtra(Intent.EXTRA_TITLE, file.name)
        try {
            startActivityForResult(create, SAVE)
        } catch (_: ActivityNotFoundException) {
            tell("This phone has no app to save files with; use Share.")
        }
    }

    override fun onActivityResult(requestCode: Int, resultCode: Int, data: Intent?) {
        val place = data?.data
        val file = report
        if (requestCode != SAVE || resultCode != RESULT_OK || place == null || file == null) return
        startTask {
            withContext(Dispatchers.IO) { Documents(contentResolver).write(place, file.readBytes()) } // it may be a server
            tell("${file.name} was saved.")
        }
    }

    /** The report, if there is one; tells the user if not. Another app's screen would stop what runs. */
    private fun finishedReport(): File? {
        if (busy) tell("Tap Stop first.") else if (report == null) tell("Nothing was measured yet: tap Run or 10 minutes.")
        return report.takeUnless { busy }
    }

    private companion object {
        const val MINUTES = 10.0
        const val REPORT = "report"
        const val SAVE = 1
    }
}

private fun figures(verification: Verification): String = buildString {
    append(verification.verdict).append('\n')
    verification.failures.forEach { append(it).append('\n') }
    append(line("lowering", verification.lowering))
    append(line("whole prompts", verification.scored))
    append(line("token by token", verification.decoded))
    append(line("decoded vs scored", verification.paths))
    verification.exact?.let { append(line("float kernels", it)) }
    append(line("quantization", verification.quantization))
}

private fun line(name: String, figures: Agreement): String =
    "%s: %d tokens, top-1 %.1f %%, near ties %d, mean KL %.1e, p99 KL %.1e\n".format(
        name, figures.positions, 100 * figures.top1, figures.nearTies, figures.meanKl, figures.p99Kl,
    )
