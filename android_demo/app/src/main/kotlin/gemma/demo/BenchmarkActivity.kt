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

/** Replays the bundle's goldens and measures speed, on this device; the result can be shared as JSON. */
class BenchmarkActivity : Screen() {
    private var report: String? = null

    override fun controls(): List<View> = listOf(row(button("Run", ::run), button("Stop", ::stop), button("Share", ::share)))

    private fun run() = begin {
        report = null
        log.text = ""
        val model = application.model ?: throw SessionException("no bundle is loaded; go back and pick one")
        val verification = onModelThread { replay(model) }
        say(figures(verification))
        status.text = "measuring speed …"
        val benchmark = onModelThread { measure(model) }
        say(speed(benchmark))
        val device = application.device
        val found = reportJson(device.describe(), model.bundle, verification, model.loading, benchmark, device.threads)
        keep(found.write(), model.bundle.directory.name)
    }

    private suspend fun replay(model: LoadedModel): Verification {
        val task = currentCoroutineContext()
        return verifyBundle(model.bundle, model.session) { done, all ->
            task.ensureActive()
            scope.launch { status.text = "golden $done of $all" }
        }
    }

    private suspend fun measure(model: LoadedModel): Benchmark {
        val task = currentCoroutineContext()
        val manifest = model.bundle.manifest
        return measureSpeed(model.session, manifest.vocabSize, Workload.of(manifest.contextLength)) { task.ensureActive() }
    }

    /** For Share, and in the folder that `adb pull` reaches. */
    private fun keep(text: String, name: String) {
        report = text
        val folder = File(getExternalFilesDir(null) ?: filesDir, "benchmarks").also { it.mkdirs() }
        val kept = File(folder, "$name.json").also { it.writeText(text) }
        status.text = "${application.device.memoryLine()}\nadb pull ${kept.path}"
    }

    private fun share() {
        val text = report ?: return
        val send = Intent(Intent.ACTION_SEND).setType("text/plain").putExtra(Intent.EXTRA_TEXT, text)
        startActivity(Intent.createChooser(send, "Share the result"))
    }
}

private fun figures(found: Verification): String = buildString {
    append(found.verdict).append('\n')
    found.failures.forEach { append(it).append('\n') }
    append(line("lowering", found.lowering))
    append(line("whole prompts", found.scored))
    append(line("token by token", found.decoded))
    append(line("one vs the other", found.paths))
    found.exact?.let { append(line("float kernels", it)) }
    append(line("quantization", found.quantization))
}

private fun line(name: String, figures: Agreement): String =
    "%s: %d tokens, top-1 %.1f %%, near ties %d, mean KL %.1e, p99 KL %.1e\n".format(
        name, figures.positions, 100 * figures.top1, figures.nearTies, figures.meanKl, figures.p99Kl,
    )

private fun speed(found: Benchmark): String = buildString {
    append('\n')
    for (prompt in found.prompts) {
        append("%d tokens: first token after %.0f ms\n".format(prompt.tokens, prompt.firstTokenMs.median))
    }
    append("%.1f tokens/s, p95 %.0f ms\n".format(found.decodeTokensPerSecond.median, found.tokenP95Ms.median))
}
