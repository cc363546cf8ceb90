package gemma.core

const val SCHEMA_VERSION = 2

enum class AttentionKind { LOCAL, GLOBAL }

/** One layer's KV cache: keys and values, each (1, kvHeads, slots, headDim). */
data class LayerCache(
    val kind: AttentionKind,
    val window: Int?, // tokens a query attends to, itself included; null on global layers
    val slots: Int,
    val kvHeads: Int,
    val headDim: Int,
    val source: Int? = null, // the layer whose cache it reads; null if it has one of its own
) {
    /** Elements of its own keys and values; a Double, because a damaged manifest could overflow an integer. */
    val elements: Double get() = if (source == null) 2.0 * kvHeads * slots * headDim else 0.0

    /** How many tokens a full ring of ONNX Runtime drops at once, so that the rest moves up. */
    internal val ringStep: Int get() = slots - (window ?: slots) + 1
}

/** The purpose of a tensor, as in `gemma_runtime/manifest.py`. Engines look tensors up by role, not by name. */
enum class TensorRole {
    TOKENS, START, POSITIONS, TOTAL, WANTED, LAST, EMBEDDINGS, PER_LAYER, HIDDEN,
    COS, SIN, MASK, SLOTS, WRITE,
    KEYS, VALUES, CACHE,
    LOGITS,
}

data class TensorSpec(
    val name: String,
    val dtype: String,
    val shape: List<Int?>, // a size of null varies from call to call
    val role: TensorRole,
    val kind: AttentionKind?, // the kind of layers it is for; null if it is for all or for none
    val layer: Int?, // the index of its layer; null if it belongs to no single layer
)

/** A program of the artifact. */
data class Graph(
    val file: String,
    val inputs: List<TensorSpec>,
    val outputs: List<TensorSpec>,
    val states: List<TensorSpec>, // caches
) {
    /** The input or output with a role; throws BundleException if there is none. */
    fun tensor(role: TensorRole): TensorSpec = (inputs + outputs).firstOrNull { it.role == role }
        ?: throw BundleException("$file has no tensor with the role ${role.jsonName}; export the model again")

    /** Each state with the output that returns it; throws BundleException if an output is missing. */
    fun returnedCaches(): List<Pair<TensorSpec, TensorSpec>> = states.map { state ->
        val output = outputs.firstOrNull { it.role == state.role && it.kind == state.kind && it.layer == state.layer }
        state to (output ?: throw BundleException("$file has no output for the cache ${state.name}; export the model again"))
    }
}

data class Model(val id: String)

data class Quantization(val recipe: String, val codesDigest: String)

data class Target(val name: String, val minRuntimeVersion: String)

data class BundleFile(val sha256: String, val bytes: Long)

/** Everything a device needs to know to run a bundle; written by the exporter. */
data class Manifest(
    val model: Model,
    val target: Target,
    val quantization: Quantization,
    val vocabSize: Int,
    val contextLength: Int,
    val prefillLength: Int,
    val stopTokens: Set<Int>,
    val sampling: Sampling?, // how the checkpoint's authors sample; null if they don't say
    val layers: List<LayerCache>,
    val cacheDtype: String,
    val graphs: Map<String, List<Graph>>, // the parts of each graph, in the order in which they run
    val files: Map<String, BundleFile>,
    val roles: Map<String, String>,
) {
    /** Bytes of all key and value caches. */
    val cacheBytes: Double get() = AttentionKind.entries.sumOf(::cacheBytes)

    /** Bytes of the files that the runtime loads: all files without a role. */
    val artifactBytes: Long get() = files.filterKeys { it !in roles.values }.values.sumOf { it.bytes }

    /** Bytes of the caches of one kind of layer. */
    fun cacheBytes(kind: AttentionKind): Double =
        layers.filter { it.kind == kind }.sumOf { it.elements } * CACHE_WIDTHS.getValue(cacheDtype)

    companion object {
        /** Throws BundleException for an unknown schema version and for a missing or mistyped field. */
        fun parse(text: String): Manifest = readManifest(JsonFields.parse("manifest.json", text))
    }
}

private fun readManifest(json: JsonFields): Manifest {
    checkSchema(json.of("schema_version").integer())
    if (json.orNull("kind") != null) throw BundleException("the bundle gives vectors of texts; this app needs one that generates text")
    return Manifest(
        model = Model(json.of("model").of("id").string()),
        target = readTarget(json.of("target")),
        quantization = readQuantization(json.of("quantization")),
        vocabSize = atLeastOne(json.of("vocab_size")),
        contextLength = atLeastOne(json.of("context_length")),
        prefillLength = atLeastOne(json.of("prefill_length")),
        stopTokens = json.of("stop_tokens").list { it.count() }.toSet(),
        sampling = json.orNull("sampling")?.let(::readSampling),
        layers = json.of("layers").let { field -> field.list(::readLayer).also { checkLayers(it, json.of("context_length").count(), field) } },
        cacheDtype = json.of("cache_dtype").let { field ->
            field.string().also { if (it !in CACHE_WIDTHS) throw field.wrong(CACHE_WIDTHS.keys.joinToString(" or ")) }
        },
        graphs = json.of("graphs").map { parts ->
            parts.list(::readGraph).also { if (it.isEmpty()) throw parts.wrong("at least one part") }
        },
        files = readFiles(json.of("files")),
        roles = json.of("roles").map { it.string() },
    )
}

/**
 * A cache holds the window of its layer, or the whole context. A layer reads the cache of one before it that is of its
 * shape and has a cache of its own.
 */
private fun checkLayers(layers: List<LayerCache>, contextLength: Int, field: JsonFields) {
    layers.forEachIndexed { index, layer ->
        if (layer.slots < minOf(layer.window ?: contextLength, contextLength) || layer.window == 0) {
            throw field.wrong("layer $index to have slots for its window or the context, not ${layer.slots}")
        }
        val source = layer.source ?: return@forEachIndexed
        val same = source < index && layers[source] == layer.copy(source = null)
        if (!same) throw field.wrong("layer $index to read the cache of an earlier layer like it, not of layer $source")
    }
}

private fun checkSchema(version: Long) {
    if (version == SCHEMA_VERSION.toLong()) return
    val action = if (version > SCHEMA_VERSION) "update the app" else "export the model again"
    throw BundleException("manifest.json has schema version $version, this app reads $SCHEMA_VERSION; $action")
}

private fun atLeastOne(field: JsonFields): Int = field.count().also { if (it < 1) throw field.wrong("at least 1") }

internal fun readSampling(json: JsonFields) = Sampling(
    temperature = json.of("temperature").double(),
    topK = json.of("top_k").count(),
    topP = json.of("top_p").double(),
    minP = json.of("min_p").double(),
    repetitionPenalty = json.of("repetition_penalty").double(),
)

private fun readFiles(json: JsonFields): Map<String, BundleFile> {
    val files = json.map { file ->
        val bytes = file.of("bytes")
        BundleFile(file.of("sha256").string(), bytes.integer().also { if (it < 0) throw bytes.wrong("at least 0") })
    }
    if (files.values.sumOf { it.bytes.toDouble() } > MOST_BYTES) throw json.wrong("fewer bytes in all files")
    return files
}

private fun readTarget(json: JsonFields) = Target(
    name = json.of("name").string(),
    minRuntimeVersion = json.of("min_runtime_version").string(),
)

private fun readQuantization(json: JsonFields) = Quantization(
    recipe = json.of("recipe").string(),
    codesDigest = json.of("codes_digest").string(),
)

private fun readLayer(json: JsonFields) = LayerCache(
    kind = oneOf(json.of("kind")),
    window = json.orNull("window")?.count(),
    slots = json.of("slots").count(),
    kvHeads = json.of("kv_heads").count(),
    headDim = json.of("head_dim").count(),
    source = json.orNull("source")?.count(),
)

private fun readGraph(json: JsonFields) = Graph(
    file = json.of("file").string(),
    inputs = json.of("inputs").list(::readTensor),
    outputs = json.of("outputs").list(::readTensor),
    states = json.of("states").list(::readTensor),
)

private fun readTensor(json: JsonFields) = TensorSpec(
    name = json.of("name").string(),
    dtype = json.of("dtype").string(),
    shape = json.of("shape").list { if (it.isString()) null else it.count() },
    role = oneOf(json.of("role")),
    kind = json.orNull("kind")?.let { oneOf<AttentionKind>(it) },
    layer = json.orNull("layer")?.count(),
)

private val Enum<*>.jsonName: String get() = name.lowercase()

private inline fun <reified T : Enum<T>> oneOf(field: JsonFields): T {
    val name = field.string()
    return enumValues<T>().firstOrNull { it.jsonName == name }
        ?: throw field.wrong(enumValues<T>().joinToString(" or ") { it.jsonName })
}

private const val MOST_BYTES = 9007199254740992.0 // 2^53: as many as a double counts
private val CACHE_WIDTHS = mapOf("float32" to 4, "float16" to 2, "int8" to 1) // bytes
