package gemma.demo

import gemma.core.Bundle
import gemma.core.BundleException
import gemma.core.BundleSession
import gemma.core.ChatCodec
import gemma.core.Conversation
import gemma.core.Engine
import gemma.core.LatencyMeter
import gemma.core.Loading
import gemma.core.Sampler
import gemma.core.Sampling
import gemma.core.SessionException
import gemma.core.memoryProblem
import gemma.core.openBundle
import java.io.Closeable
import java.io.File

/** A backend: opens one of the bundle's graphs with a number of threads. */
private class Backend(val cachesOnHeap: Boolean, val open: (Bundle, String, Int) -> Engine)

private val BACKENDS = mapOf(
    "onnx" to Backend(cachesOnHeap = true, ::OnnxEngine),
    "executorch" to Backend(cachesOnHeap = false) { bundle, graph, _ -> ExecutorchEngine(bundle, graph) },
)

/** A checked and loaded bundle with its conversation. Only the model thread may use it. */
class LoadedModel private constructor(
    val bundle: Bundle,
    val session: BundleSession,
    val conversation: Conversation,
    val meter: LatencyMeter,
    val loading: Loading,
) : Closeable {
    override fun close() = session.close()

    companion object {
        /** Throws GemmaException with a message for the user if anything is wrong. */
        fun load(directory: File, device: Device, onProgress: (Double) -> Unit): LoadedModel {
            val check = LatencyMeter()
            val bundle = check.load { openBundle(directory, onProgress) }
            val target = bundle.manifest.target.name
            val backend = BACKENDS[target] ?: throw SessionException(
                "${directory.name} is for $target, but this app runs only ${BACKENDS.keys.joinToString()}; " +
                    "export with --target onnx",
            )
            val heap = device.heapBytes.takeIf { backend.cachesOnHeap }
            memoryProblem(bundle.manifest, device.memoryBytes, heap)?.let { throw BundleException(it) }
            val codec = ChatCodec.load(bundle)
            val meter = LatencyMeter()
            val session = meter.load {
                BundleSession(bundle.manifest) { graph -> catchOutOfMemory(directory) { backend.open(bundle, graph, device.threads) } }
            }
            val sampling = bundle.manifest.sampling ?: CHAT
            val loading = Loading(check.latency().loadMs ?: 0.0, meter.latency().loadMs ?: 0.0)
            return LoadedModel(bundle, session, Conversation(session, codec, Sampler(sampling)), meter, loading)
        }

        private fun <T> catchOutOfMemory(directory: File, open: () -> T): T = try {
            open()
        } catch (error: OutOfMemoryError) {
            throw SessionException("${directory.name} needs more memory than is free; close other apps", error)
        }

        private val CHAT = Sampling(temperature = 1.0, topK = 64, topP = 0.95) // as Gemma's authors recommend, for bundles that say nothing
    }
}
