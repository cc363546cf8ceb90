package gemma.demo

import gemma.core.Bundle
import gemma.core.BundleException
import gemma.core.BundleSession
import gemma.core.Conversation
import gemma.core.Engine
import gemma.core.LatencyMeter
import gemma.core.Loading
import gemma.core.Sampler
import gemma.core.Sampling
import gemma.core.SessionException
import gemma.core.Voice
import gemma.core.misfit
import gemma.core.openBundle
import java.io.Closeable
import java.io.File

/** A backend: opens one of the bundle's graphs on so many threads. */
private class Backend(val cachesOnHeap: Boolean, val open: (Bundle, String, Int) -> Engine)

private val BACKENDS = mapOf(
    "onnx" to Backend(cachesOnHeap = true, ::OnnxEngine),
    "executorch" to Backend(cachesOnHeap = false) { bundle, graph, _ -> ExecutorchEngine(bundle, graph) },
)

/** A bundle that was checked and loaded, and the talk with it. Used from the model thread alone. */
class LoadedModel private constructor(
    val bundle: Bundle,
    val session: BundleSession,
    val conversation: Conversation,
    val meter: LatencyMeter,
    val loading: Loading,
) : Closeable {
    override fun close() = session.close()

    companion object {
        /** Raises GemmaException, with a sentence for the user, where anything is wrong. */
        fun load(directory: File, device: Device, onProgress: (Double) -> Unit): LoadedModel {
            val check = LatencyMeter()
            val bundle = check.load { openBundle(directory, onProgress) }
            val target = bundle.manifest.target.name
            val backend = BACKENDS[target] ?: throw SessionException(
                "${directory.name} is for $target, this app runs ${BACKENDS.keys.joinToString()}; export with --target onnx",
            )
            val heap = device.heapBytes.takeIf { backend.cachesOnHeap }
            misfit(bundle.manifest, device.memoryBytes, heap)?.let { throw BundleException(it) }
            val voice = Voice.load(bundle)
            val meter = LatencyMeter()
            val session = meter.load {
                BundleSession(bundle.manifest) { graph -> roomFor(directory) { backend.open(bundle, graph, device.threads) } }
            }
            val loading = Loading(check.latency().loadMillis ?: 0.0, meter.latency().loadMillis ?: 0.0)
            return LoadedModel(bundle, session, Conversation(session, voice, Sampler(CHAT)), meter, loading)
        }

        private fun <T> roomFor(directory: File, open: () -> T): T = try {
            open()
        } catch (error: OutOfMemoryError) {
            throw SessionException("there is not enough free memory for ${directory.name}; close other apps", error)
        }

        private val CHAT = Sampling(temperature = 1.0, topK = 64, topP = 0.95) // what Gemma's authors advise
    }
}
