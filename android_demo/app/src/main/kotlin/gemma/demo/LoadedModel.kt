package gemma.demo

import gemma.core.Bundle
import gemma.core.BundleException
import gemma.core.Engine
import gemma.core.EngineSession
import gemma.core.LatencyMeter
import gemma.core.Session
import gemma.core.SessionException
import gemma.core.Voice
import gemma.core.misfit
import gemma.core.openBundle
import java.io.Closeable
import java.io.File

private val ENGINES: Map<String, (Bundle, Int) -> Engine> = mapOf(
    "onnx" to ::OnnxEngine,
    "executorch" to { bundle, _ -> ExecutorchEngine(bundle) },
)

/** A bundle that was checked and loaded. Used from the model thread alone. */
class LoadedModel private constructor(
    val bundle: Bundle,
    val voice: Voice,
    val session: Session,
    val meter: LatencyMeter,
) : Closeable {
    override fun close() = session.close()

    companion object {
        /** Raises GemmaException, with a sentence for the user, where anything is wrong. */
        fun load(directory: File, device: Device, onProgress: (Double) -> Unit): LoadedModel {
            val bundle = openBundle(directory, onProgress)
            misfit(bundle.manifest, device.memoryBytes)?.let { throw BundleException(it) }
            val target = bundle.manifest.target.name
            val open = ENGINES[target] ?: throw SessionException(
                "${directory.name} is for $target, this app runs ${ENGINES.keys.joinToString()}; export with --target onnx",
            )
            val voice = Voice.load(bundle)
            val meter = LatencyMeter()
            val engine = try {
                meter.load { open(bundle, device.threads) }
            } catch (error: OutOfMemoryError) {
                throw SessionException("there is not enough free memory for ${directory.name}; close other apps", error)
            }
            return LoadedModel(bundle, voice, EngineSession(engine, bundle.manifest), meter)
        }
    }
}
