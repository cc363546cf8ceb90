package gemma.demo

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtSession
import gemma.core.Bundle
import gemma.core.Engine
import gemma.core.SessionException
import gemma.core.TensorRole
import gemma.core.TensorSpec
import gemma.core.checkRuntime
import java.io.File
import java.io.IOException
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.IntBuffer
import java.nio.LongBuffer

/**
 * ONNX Runtime on the CPU. Past and present caches share their buffers, so a step copies no cache. The caches are
 * mapped in `folder`.
 */
class OnnxEngine(bundle: Bundle, graph: String, override val threads: Int, private val folder: File) : Engine {
    override val givesEveryRow = true

    private val environment = OrtEnvironment.getEnvironment().also {
        attempt("turn off its telemetry") { it.setTelemetry(System.getenv("ORT_DISABLE_TELEMETRY") == "0") }
        checkRuntime("onnxruntime-android", it.version, bundle.manifest.target.minRuntimeVersion)
    }
    override val runtime = "ONNX Runtime ${environment.version}"
    private val vocabSize = bundle.manifest.vocabSize
    private val signature = bundle.graph(graph)
    private val returned = signature.returnedCaches()
    private val session = load(File(bundle.directory, signature.file), threads)
    private val caches = emptyCaches(signature.states)
    private val presents = returned.associate { (past, present) -> present.name to caches.getValue(past.name) }
    private val last = lazy { Rows(1) } // logits of one token, reused for every new token

    override fun run(tokens: IntArray, position: Int, rows: Int): List<FloatArray> = attempt("run the model") {
        val logits = if (rows == 1) last.value else Rows(rows)
        try {
            run(tokens, position, rows, logits)
        } finally {
            if (rows > 1) logits.tensor.close()
        }
    }

    override fun close() {
        if (last.isInitialized()) last.value.tensor.close()
        caches.values.forEach { it.close() }
        session.close()
    }

    private fun run(tokens: IntArray, position: Int, rows: Int, logits: Rows): List<FloatArray> {
        val inputs = openInputs(tokens, position + tokens.size, rows)
        try {
            // All outputs are bound to our buffers, so the result owns nothing.
            session.run(inputs + caches, presents + (signature.tensor(TensorRole.LOGITS).name to logits.tensor)).close()
        } finally {
            inputs.values.forEach { it.close() }
        }
        return logits.read()
    }

    /** The output buffer of the logits, (1, rows, V), read directly because the tensor's getter would copy it. */
    private inner class Rows(private val rows: Int) {
        private val floats: FloatBuffer = buffer(4 * rows * vocabSize).asFloatBuffer()
        val tensor: OnnxTensor =
            OnnxTensor.createTensor(environment, floats, longArrayOf(1, rows.toLong(), vocabSize.toLong()))

        fun read(): List<FloatArray> {
            val view = floats.duplicate()
            return List(rows) { FloatArray(vocabSize).also(view::get) }
        }
    }

    private fun openInputs(tokens: IntArray, total: Int, rows: Int): Map<String, OnnxTensor> {
        val ids = LongArray(tokens.size) { tokens[it].toLong() }
        val positions = LongArray(rows) { (tokens.size - rows + it).toLong() }
        val inputs = mapOf(
            TensorRole.TOKENS to OnnxTensor.createTensor(environment, LongBuffer.wrap(ids), longArrayOf(1, tokens.size.toLong())),
            TensorRole.TOTAL to OnnxTensor.createTensor(environment, IntBuffer.wrap(intArrayOf(total)), longArrayOf()),
            TensorRole.WANTED to OnnxTensor.createTensor(environment, LongBuffer.wrap(positions), longArrayOf(rows.toLong())),
        )
        return inputs.mapKeys { signature.tensor(it.key).name }
    }

    private fun load(path: File, threads: Int): OrtSession = attempt("load ${path.name}") {
        OrtSession.SessionOptions().use { options ->
            options.setIntraOpNumThreads(threads)
            options.setInterOpNumThreads(1)
            environment.createSession(path.path, options)
        }
    }

    private fun emptyCaches(states: List<TensorSpec>): Map<String, OnnxTensor> {
        val caches = LinkedHashMap<String, OnnxTensor>()
        var complete = false
        try {
            states.forEach { caches[it.name] = emptyCache(it) }
            complete = true
        } finally {
            if (!complete) { // the constructor fails, so nobody can close this engine
                caches.values.forEach { it.close() }
                session.close()
            }
        }
        return caches
    }

    private fun emptyCache(state: TensorSpec): OnnxTensor {
        val type = when (state.dtype) {
            "float32" -> OnnxJavaType.FLOAT
            "float16" -> OnnxJavaType.FLOAT16
            "int8" -> OnnxJavaType.INT8
            else -> throw SessionException(
                "the cache ${state.name} is ${state.dtype}, expected float32, float16 or int8; export the model again",
            )
        }
        val shape = state.shape.map { size ->
            size?.toLong() ?: throw SessionException("the cache ${state.name} has no fixed shape; export the model again")
        }.toLongArray()
        val bytes = shape.fold(type.size.toDouble()) { product, size -> product * size }
        if (bytes > Int.MAX_VALUE) {
            throw SessionException("the cache ${state.name} has $bytes bytes; export with a shorter --context")
        }
        return attempt("allocate a cache") {
            OnnxTensor.createTensor(environment, mapMemory(folder, bytes.toInt()), shape, type)
        }
    }

    private fun <T> attempt(what: String, work: () -> T): T = try {
        work()
    } catch (error: OrtException) {
        throw SessionException("ONNX Runtime can't $what: ${error.message}; copy or export the bundle again", error)
    } catch (error: IOException) {
        throw SessionException("the app can't $what: ${error.message}; free some storage", error)
    }

    // A direct buffer in native byte order: the runtime writes into it in place.
    private fun buffer(bytes: Int): ByteBuffer = ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder())
}
