package gemma.demo

import android.content.Intent
import android.view.View
import gemma.core.Agreement
import gemma.core.Benchmark
import gemma.core.SessionException
import gemma.core.Verification
import gemma.core.Workload
import gemma.core.measureSpeed
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

    override fun controls(): List<View> = listOf(row(button("Run", ::run), button("Stop", ::stop), button("Share", ::share)))

    private fun run() = startTask {
        sharedReport = null
        log.text = ""
        val model = loadedModel() ?: throw SessionException("no bundle was chosen; go back and choose one")
        val device = application.device
        val before = device.state("start")
        val verification = onModelThread { verify(model) }
        appendText(figures(verification))
        status.text = "measuring speed …"
        val benchmark = onModelThread { measure(model) }
        appendText(speed(benchmark))
        val about = device.describe() + ("runtime" to model.session.runtime) + before + device.state("end")
        val report = reportJson(about, model.bundle, verification, model.loading, benchmark, device.threads)
        save(report.write(), model.bundle.directory.name)
    }

    private suspend fun verify(model: LoadedModel): Verification {
        val task = currentCoroutineContext()
        return verifyBundle(model.bundle, model.session, { task.ensureActive() }) { done, all ->
            scope.launch { status.text = "golden $done of $all" }
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
        status.text = "${application.device.memoryLine()}\nadb pull ${file.path}"
    }

    private fun share() {
        val text = sharedReport ?: return
        val send = Intent(Intent.ACTION_SEND).setType("text/plain").putExtra(Intent.EXTRA_TEXT, text)
        startActivity(Intent.createChooser(send, "Share the result"))
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
