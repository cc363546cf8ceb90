package gemma.demo

import gemma.core.Bundle
import gemma.core.Engine
import gemma.core.SessionException
import gemma.core.checkRuntime
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor
import java.io.File

/** An ExecuTorch Module with one method, `forward(tokens, start)`; the program holds the caches. */
class ExecutorchEngine(bundle: Bundle, graph: String, override val threads: Int) : Engine {
    override val givesEveryRow = false
    override val runtime = "ExecuTorch ${BuildConfig.EXECUTORCH_VERSION}"

    init { // the library doesn't tell its version
        checkRuntime("executorch-android", BuildConfig.EXECUTORCH_VERSION, bundle.manifest.target.minRuntimeVersion)
    }

    // Mapped, so that weights can leave memory and come back; the default reads the whole file onto the heap.
    private val module = attempt("load the program") {
        Module.load(File(bundle.directory, bundle.graph(graph).file).path, Module.LOAD_MODE_MMAP, threads)
    }

    override fun run(tokens: IntArray, position: Int, rows: Int): List<FloatArray> {
        if (rows != 1) throw SessionException("$rows rows of logits were requested, but this program returns only the last one")
        val ids = Tensor.fromBlob(LongArray(tokens.size) { tokens[it].toLong() }, longArrayOf(1, tokens.size.toLong()))
        val start = Tensor.fromBlob(longArrayOf(position.toLong()), longArrayOf(1))
        return attempt("run the program") {
            listOf(module.forward(EValue.from(ids), EValue.from(start))[0].toTensor().dataAsFloatArray)
        }
    }

    override fun close() = module.destroy()

    // The library throws several kinds of RuntimeException and documents only their messages.
    private fun <T> attempt(what: String, work: () -> T): T = try {
        work()
    } catch (error: RuntimeException) {
        throw SessionException("ExecuTorch can't $what: ${error.message}; copy or export the bundle again", error)
    }
}
