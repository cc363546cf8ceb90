package gemma.demo

import android.content.Intent
import android.view.View
import gemma.core.Agreement
import gemma.core.GenerationRequest
import gemma.core.Latency
import gemma.core.Limits
import gemma.core.Sampler
import gemma.core.Sampling
import gemma.core.SessionException
import gemma.core.TokenGeneration
import gemma.core.Verification
import gemma.core.loadGoldens
import gemma.core.reportJson
import gemma.core.verify
import gemma.core.write
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.launch

/** Replays the bundle's goldens and measures the loop, on this device; the result can be shared as JSON. */
class BenchmarkActivity : Screen() {
    private var report: String? = null

    override fun controls(): List<View> = listOf(row(button("Run", ::run), button("Stop", ::stop), button("Share", ::share)))

    override fun onStop() {
        stop()
        super.onStop()
    }

    private fun run() = begin {
        report = null
        log.text = ""
        val model = onModelThread { application.model } ?: throw SessionException("no bundle is loaded; go back and pick one")
        val verification = onModelThread { replay(model) }
        say(figures(verification))
        val latency = onModelThread { measure(model) }
        say(speed(latency))
        report = reportJson(application.device.describe(), model.bundle.manifest, verification, latency).write()
        status.text = application.device.memoryLine()
    }

    private suspend fun replay(model: LoadedModel): Verification {
        val context = currentCoroutineContext()
        val goldens = loadGoldens(model.bundle)
        return verify(model.session, goldens, Limits.of(model.bundle.manifest.target.name)) { done ->
            context.ensureActive()
            scope.launch { status.text = "golden $done of ${goldens.size}" }
        }
    }

    private suspend fun measure(model: LoadedModel): Latency {
        val prompt = IntArray(PROMPT) { if (it == 0) model.bundle.manifest.bosToken else FIRST_WORD + it }
        val length = minOf(prompt.size, model.session.contextLength / 2)
        model.session.reset()
        val request = GenerationRequest(prompt.copyOf(length), IntArray(0), NEW_TOKENS, emptySet())
        model.meter.start()
        TokenGeneration(model.session, request, Sampler(Sampling())).flow().collect { model.meter.token() }
        model.session.reset()
        return model.meter.latency()
    }

    private fun share() {
        val text = report ?: return
        val send = Intent(Intent.ACTION_SEND).setType("application/json").putExtra(Intent.EXTRA_TEXT, text)
        startActivity(Intent.createChooser(send, "Share the result"))
    }

    private companion object {
        const val PROMPT = 128
        const val NEW_TOKENS = 64
        const val FIRST_WORD = 200
    }
}

private fun figures(found: Verification): String = buildString {
    append(found.verdict).append('\n')
    found.failures.forEach { append(it).append('\n') }
    append(line("lowering", found.lowering))
    append(line("whole prompts", found.scored))
    append(line("token by token", found.decoded))
    append(line("one vs the other", found.paths))
    append(line("quantization", found.quantization))
}

private fun line(name: String, figures: Agreement): String =
    "%s: %d tokens, top-1 %.1f %%, near ties %d, mean KL %.1e, p99 KL %.1e\n".format(
        name, figures.positions, 100 * figures.top1, figures.nearTies, figures.meanKl, figures.p99Kl,
    )

private fun speed(latency: Latency): String = "\nfirst token %.0f ms, %.1f tokens/s, p95 %.0f ms\n".format(
    latency.firstTokenMillis, latency.tokensPerSecond, latency.tokenP95Millis,
)
