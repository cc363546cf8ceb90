package gemma.demo

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
import gemma.core.verifyBundle
import gemma.core.write
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.launch
import java.io.File

/** Verifies the bundle against its goldens and measures its speed on this device; shares the results as JSON. */
class BenchmarkActivity : Screen() {
    private var sharedReport: String? = null
    private var results = Results()
    private lateinit var curve: CurveView

    /** What was measured since the screen was opened. */
    private data class Results(
        val model: LoadedModel? = null, // of which; another one begins anew
        val verification: Verification? = null,
        val benchmark: Benchmark? = null,
        val sustained: Sustained? = null,
    )

    private class Page(val text: String, val spans: List<Span>, val results: Results, val report: String?)

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        (inherited as? Page)?.let { page ->
            log.text = page.text
            curve.show(page.spans, MINUTES * 60)
            results = page.results
            sharedReport = page.report
        }
    }

    override val remains: Any get() = Page(log.text.toString(), curve.spans, results, sharedReport)

    override fun controls(): List<View> {
        curve = CurveView(this, dp(1).toFloat(), status.currentTextColor).apply { visibility = View.GONE }
        curve.layoutParams = LinearLayout.LayoutParams(LinearLayout.LayoutParams.MATCH_PARENT, dp(160))
        return listOf(curve, row(button("Run", ::run), button("10 minutes", ::sustain)), row(button("Stop", ::stop), button("Share", ::share)))
    }

    private fun run() = startTask {
        sharedReport = null
        log.text = ""
        val model = loadedModel() ?: throw SessionException("no bundle was chosen; go back and choose one")
        val device = application.device
        val before = device.state("start")
        val verification = onModelThread { verify(model) }
        appendText(figures(verification))
        tell("measuring speed …")
        val benchmark = onModelThread { measure(model) }
        appendText(speed(benchmark))
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
        val report = reportJson(
            about, model.bundle, results.verification, model.loading, results.benchmark, results.sustained, session.threads,
        )
        save(report.write(), model.bundle.directory.name)
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

    /** Keeps the report for Share and writes it where `adb pull` can read it. */
    private fun save(text: String, name: String) {
        sharedReport = text
        val folder = File(getExternalFilesDir(null) ?: filesDir, "benchmarks").also { it.mkdirs() }
        val file = File(folder, "$name.json").also { it.writeText(text) }
        tell("${application.device.memoryLine()}\nadb pull ${file.path}")
    }

    private fun share() {
        val text = sharedReport ?: return
        val send = Intent(Intent.ACTION_SEND).setType("text/plain").putExtra(Intent.EXTRA_TEXT, text)
        startActivity(Intent.createChooser(send, "Share the result"))
    }

    private companion object {
        const val MINUTES = 10.0
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

private fun speed(benchmark: Benchmark): String = buildString {
    append('\n')
    for (prompt in benchmark.prompts) {
        append("%d tokens: first token after %.0f ms\n".format(prompt.tokens, prompt.firstTokenMs.median))
    }
    append("%.1f tokens/s, p95 %.0f ms\n".format(benchmark.decodeTokensPerSecond.median, benchmark.tokenP95Ms.median))
}
