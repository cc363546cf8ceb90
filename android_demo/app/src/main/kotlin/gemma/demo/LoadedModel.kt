package gemma.demo

import gemma.core.Bundle
import gemma.core.BundleException
import gemma.core.BundleSession
import gemma.core.ChatCodec
import gemma.core.CheckedBundles
import gemma.core.Engine
import gemma.core.LatencyMeter
import gemma.core.Loading
import gemma.core.SavedChat
import gemma.core.SessionException
import gemma.core.Talk
import gemma.core.memoryProblem
import gemma.core.openBundle
import java.io.Closeable
import java.io.File

/** Opens one of a bundle's graphs with a number of threads; the folder is for mapped caches. */
private val BACKENDS = mapOf<String, (Bundle, String, Int, File) -> Engine>(
    "onnx" to ::OnnxEngine,
    "executorch" to { bundle, graph, threads, _ -> ExecutorchEngine(bundle, graph, threads) },
)

/** A checked and loaded bundle. Only the model thread may use it. */
class LoadedModel private constructor(
    val bundle: Bundle,
    val session: BundleSession,
    val codec: ChatCodec,
    val meter: LatencyMeter,
    val loading: Loading,
) : Closeable {
    private var talk: Talk? = null

    /** The conversation of a chat. One that was saved, or whose settings have changed, is fed again with its next question. */
    fun talk(chat: SavedChat): Talk {
        talk?.takeIf { it.goesOnWith(chat) }?.let { return it }
        val conversation = chat.settings.conversation(session, codec, bundle.manifest, chat)
        return Talk(chat, conversation).also { talk = it }
    }

    override fun close() = session.close()

    companion object {
        /**
         * Loads a bundle that computes with so many threads. Throws GemmaException with a message for the user if anything
         * is wrong. `folder` is for temporary files.
         */
        fun load(directory: File, threads: Int, device: Device, checked: CheckedBundles, folder: File, onProgress: (Double) -> Unit): LoadedModel {
            val check = LatencyMeter()
            val bundle = check.load { openBundle(directory, checked, onProgress) }
            val target = bundle.manifest.target.name
            val open = BACKENDS[target] ?: throw SessionException(
                "${directory.name} is for $target, but this app runs only ${BACKENDS.keys.joinToString()}; " +
                    "export with --target onnx",
            )
            memoryProblem(bundle.manifest, device.memoryBytes)?.let { throw BundleException(it) }
            val codec = ChatCodec.load(bundle)
            val meter = LatencyMeter()
            val session = meter.load { BundleSession(bundle.manifest) { graph -> open(bundle, graph, threads, folder) } }
            val loading = Loading(check.latency().loadMs ?: 0.0, meter.latency().loadMs ?: 0.0)
            return LoadedModel(bundle, session, codec, meter, loading)
        }
    }
}
