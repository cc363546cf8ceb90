package gemma.core

import java.io.File
import java.nio.file.Files
import kotlin.test.AfterTest
import kotlin.test.Test
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertNotNull
import kotlin.test.assertNull
import kotlin.test.assertTrue

class BundleTest {
    private val folder = Files.createTempDirectory("bundle").toFile().also { TINY.copyRecursively(it, overwrite = true) }

    @AfterTest
    fun remove() {
        folder.deleteRecursively()
    }

    @Test
    fun `the manifest's numbers are read`() {
        val shares = ArrayList<Double>()
        val manifest = openBundle(folder) { shares += it }.manifest
        assertEquals(Sampling(temperature = 1.0, topK = 64, topP = 0.95), manifest.sampling)
        val numbers = listOf(manifest.vocabSize, manifest.contextLength, manifest.prefillLength)
        assertEquals(listOf(376, 96, 16), numbers)
        assertEquals(setOf(1, 5), manifest.stopTokens)
        assertEquals(LayerCache(AttentionKind.LOCAL, 8, 72, 2, 32), manifest.layers[0])
        assertEquals(listOf(1, null), manifest.graphs.getValue("decode").single().inputs[0].shape)
        assertEquals(2.0 * 2 * 32 * 4 * (72 + 96) * 2, manifest.cacheBytes)
        assertEquals("tokenizer.gtok", manifest.roles["tokenizer_compact"])
        assertEquals(1.0, shares.last())
    }

    @Test
    fun `an altered, a truncated and a missing file are refused by name`() {
        val goldens = File(folder, "goldens.json")
        val whole = goldens.readBytes()
        goldens.writeBytes(whole.copyOf().also { it[100] = (it[100] + 1).toByte() })
        assertContains(refusal(), "goldens.json was altered")
        goldens.writeBytes(whole.copyOf(whole.size - 1))
        assertContains(refusal(), "the manifest says ${whole.size}")
        goldens.delete()
        assertContains(refusal(), "goldens.json is missing")
    }

    @Test
    fun `a path that leaves the bundle is refused`() {
        for (name in listOf("../goldens.json", "/etc/hostname", "a/../../b", "a\\\\b")) {
            alter("\"goldens.json\": {", "\"$name\": {")
            alter("\"goldens\": \"goldens.json\"", "\"goldens\": \"$name\"")
            assertContains(refusal(), "outside of the bundle")
            TINY.copyRecursively(folder, overwrite = true)
        }
        File(folder, "goldens.json").delete()
        Files.createSymbolicLink(File(folder, "goldens.json").toPath(), File(TINY, "goldens.json").absoluteFile.toPath())
        assertContains(refusal(), "a link to a file outside of the bundle")
    }

    @Test
    fun `an unknown schema version, a missing field and a wrong type are refused by name`() {
        val cases = listOf(
            Triple("\"schema_version\": 2", "\"schema_version\": 3", "update the app"),
            Triple("\"schema_version\": 2", "\"schema_version\": 1", "export the model again"),
            Triple("\"schema_version\": 2", "\"schema_version\": 2, \"kind\": \"encoder\"", "gives vectors of texts"),
            Triple("\"role\": \"total\"", "\"role\": \"sum\"", "\$.graphs.prefill[0].inputs[1].role is \"sum\""),
            Triple("\"kind\": \"local\"", "\"kind\": \"far\"", "expected local or global"),
            Triple("\"vocab_size\": 376", "\"vocab_size\": \"376\"", "\$.vocab_size is \"376\""),
            Triple("\"vocab_size\": 376", "\"words\": 376", "no \"vocab_size\""),
            Triple("\"context_length\": 96", "\"context_length\": -1", "\$.context_length"),
            Triple("\"cache_dtype\": \"float32\"", "\"cache_dtype\": \"int3\"", "float32 or float16 or int8"),
            Triple("\"goldens\": \"goldens.json\"", "\"goldens\": \"other.json\"", "no digest"),
            Triple("\"kind\": \"local\",", "\"kind\": \"local\", \"source\": 9,", "not of layer 9"),
            Triple("\"slots\": 72", "\"slots\": 7", "layer 0 to have slots for its window"),
            Triple("\"window\": 8", "\"window\": 0", "layer 0 to have slots for its window"),
        )
        for ((old, new, message) in cases) {
            alter(old, new)
            assertContains(refusal(), message)
            TINY.copyRecursively(folder, overwrite = true)
        }
    }

    @Test
    fun `a bundle too large for the device gives a message that says what to do`() {
        val manifest = openBundle(folder).manifest
        assertNull(memoryProblem(manifest, 1L shl 30))
        assertContains(assertNotNull(memoryProblem(manifest, 1L shl 19)), "Export a smaller size")
    }

    @Test
    fun `a layer that reads another's cache takes no memory`() {
        val manifest = openBundle(folder).manifest
        val layers = manifest.layers
        val sharing = manifest.copy(layers = layers + layers.mapIndexed { index, layer -> layer.copy(source = index) })
        assertEquals(manifest.cacheBytes, sharing.cacheBytes)
    }

    @Test
    fun `tensors are found by role and caches paired by layer, whatever their names`() {
        alter("\"past_key_1\"", "\"a\"")
        alter("\"present_key_1\"", "\"b\"")
        alter("\"name\": \"wanted\"", "\"name\": \"rows\"")
        val manifest = Manifest.parse(File(folder, MANIFEST).readText())
        val graph = Bundle(folder, manifest).graph("decode")
        assertEquals("rows", graph.tensor(TensorRole.WANTED).name)
        val pairs = graph.returnedCaches().map { (past, present) -> past.name to present.name }
        assertEquals(8, pairs.size)
        assertEquals(listOf("past_value_0" to "present_value_0", "a" to "b"), pairs.subList(1, 3))
        assertContains(failure { graph.tensor(TensorRole.COS) }, "the role cos")
        assertContains(failure { graph.copy(outputs = emptyList()).returnedCaches() }, "past_key_0")
    }

    /** The manifest of a Gemma 4 for Core ML was refused as not valid; the app could not say whom it is for. */
    @Test
    fun `the roles are those of the Python runtime, and a manifest for Core ML is read`() {
        val roles = File(DATA, "../../runtime/gemma_runtime/manifest.py").readText().substringAfter("class TensorRole").substringBefore("@dataclass")
            .let { Regex("^    [A-Z_]+ = \"(\\w+)\"", RegexOption.MULTILINE).findAll(it) }.map { it.groupValues[1] }
        assertEquals(roles.toList() - "vector", TensorRole.entries.map { it.name.lowercase() }, "vector is only of bundles that are refused")
        alter("\"name\": \"onnx\"", "\"name\": \"coreml\"")
        alter("\"role\": \"wanted\"", "\"role\": \"per_layer\"")
        val manifest = openBundle(folder).manifest
        assertEquals("coreml", manifest.target.name)
        assertEquals("wanted", manifest.graphs.getValue("decode").single().tensor(TensorRole.PER_LAYER).name)
    }

    @Test
    fun `a graph in several parts is refused where one part is expected`() {
        val manifest = openBundle(folder).manifest
        val graph = manifest.graphs.getValue("decode").single()
        val split = Bundle(folder, manifest.copy(graphs = mapOf("decode" to listOf(graph, graph))))
        assertContains(failure { split.graph("decode") }, "2 parts of the decode graph")
        assertContains(failure { split.graph("exact") }, "0 parts of the exact graph")
    }

    private fun failure(work: () -> Unit): String = assertFailsWith<BundleException> { work() }.message.orEmpty()

    private fun refusal(): String = assertFailsWith<BundleException> { openBundle(folder) }.message.orEmpty()

    private fun alter(old: String, new: String) {
        val manifest = File(folder, MANIFEST)
        val text = manifest.readText()
        assertTrue(old in text)
        manifest.writeText(text.replace(old, new))
    }
}
