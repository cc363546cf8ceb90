package gemma.core

import java.io.ByteArrayInputStream
import java.io.ByteArrayOutputStream
import java.io.File
import java.io.InputStream
import java.nio.file.Files
import java.util.zip.ZipEntry
import java.util.zip.ZipOutputStream
import kotlin.test.AfterTest
import kotlin.test.Test
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

/** Getting bundles in, keeping them side by side, deleting them, and opening them without hashing again. */
class LibraryTest {
    private val root = Files.createTempDirectory("library").toFile()
    private val folder = File(root, "bundles")
    private val library = BundleLibrary(folder)
    private val files = TINY.walk().filter { it.isFile }.associate { it.name to it.readBytes() }

    @AfterTest
    fun remove() {
        root.deleteRecursively()
    }

    private fun zip(entries: Iterable<Pair<String, ByteArray>>): InputStream {
        val bytes = ByteArrayOutputStream()
        ZipOutputStream(bytes).use { zip ->
            for ((name, content) in entries) {
                zip.putNextEntry(ZipEntry(name))
                zip.write(content)
            }
        }
        return ByteArrayInputStream(bytes.toByteArray())
    }

    private fun refusal(entries: Iterable<Pair<String, ByteArray>>): String {
        val message = assertFailsWith<BundleException> { library.importZip("bad", zip(entries)) }.message.orEmpty()
        assertEquals(emptyList(), folder.list().orEmpty().filter { "import" in it || "bad" in it })
        return message
    }

    @Test
    fun `a zip with a folder or without one becomes a bundle, and bundles lie side by side`() {
        var written = 0L
        val first = library.importZip("archive", zip(files.map { (name, content) -> "gemma tiny/$name" to content })) { written = it }
        assertEquals("gemma tiny", first.name)
        assertEquals(files.values.sumOf { it.size.toLong() }, written)
        val extra = files.toList() + ("notes.txt" to byteArrayOf(1))
        val second = library.importZip("gemma tiny", zip(extra))
        assertEquals("gemma tiny (2)", second.name)
        assertEquals(files.keys, second.list().orEmpty().toSet(), "a file that the manifest doesn't name is left out")
        val third = library.importFiles("a/b: c.", files.mapValues { (_, content) -> { ByteArrayInputStream(content) } })
        assertEquals(listOf("ab c", "gemma tiny", "gemma tiny (2)"), library.bundles().map { it.name })
        library.delete(second)
        assertEquals(listOf(third, first), library.bundles())
        val summary = library.summary(first)
        assertEquals(listOf("onnx", "int4"), listOf(summary.target, summary.recipe))
        assertEquals(files.filterKeys { it != MANIFEST }.values.sumOf { it.size.toLong() }, summary.bytes)
    }

    @Test
    fun `no file of a zip lands outside of the bundle, and none twice`() {
        for (name in listOf("../evil", "/etc/evil", "a/../../evil", "a\\evil", "a//b", ".", "a/./b", "x".repeat(300))) {
            assertContains(refusal(files.toList() + (name to byteArrayOf(1))), "outside of the bundle", message = name)
        }
        assertContains(refusal(files.toList() + ("MANIFEST.json" to byteArrayOf(1))), "twice")
        assertEquals(listOf("bundles"), root.list().orEmpty().toList())
    }

    @Test
    fun `an archive that grows beyond the free storage, and one with too many files, are refused`() {
        val part = File(root, "part")
        val bundle = ImportedBundle(part, room = 1_000_000) {}
        val zeros = object : InputStream() {
            override fun read() = 0

            override fun read(block: ByteArray, from: Int, count: Int) = count // without end
        }
        assertContains(assertFailsWith<BundleException> { bundle.add("bomb", zeros) }.message.orEmpty(), "that are free")
        assertTrue(File(part, "bomb").length() <= 1_000_000)
        assertContains(refusal((0..1000).map { "file$it" to ByteArray(0) }), "more than 1000 files")
    }

    @Test
    fun `a damaged, an incomplete and an interrupted archive leave nothing`() {
        assertContains(refusal(files.mapValues { (name, it) -> if (name == "goldens.json") it + 1 else it }.toList()), "goldens.json has")
        assertContains(refusal(files.filterKeys { it != "goldens.json" }.toList()), "goldens.json is missing")
        assertContains(refusal(files.filterKeys { it != MANIFEST }.toList()), "not a bundle")
        assertContains(refusal(emptyList()), "not a bundle")
        val cut = zip(files.toList()).readBytes().let { it.copyOf(it.size / 2) }
        assertFailsWith<BundleException> { library.importZip("bad", ByteArrayInputStream(cut)) }
        assertFailsWith<IllegalStateException> { library.importZip("bad", zip(files.toList())) { error("stopped") } }
        assertEquals(emptyList(), folder.list().orEmpty().toList())
        File(folder, ".import-1/deep").mkdirs() // by a process that died
        BundleLibrary(folder)
        assertEquals(emptyList(), folder.list().orEmpty().toList())
    }

    @Test
    fun `deleting follows no link`() {
        val bundle = library.importZip("tiny", zip(files.toList()))
        val outside = File(root, "outside").also { it.mkdirs() }
        File(outside, "kept").writeText("kept")
        Files.createSymbolicLink(File(bundle, "link").toPath(), outside.toPath())
        library.delete(bundle)
        assertTrue(File(outside, "kept").isFile)
        assertFailsWith<IllegalArgumentException> { library.delete(outside) }
    }

    @Test
    fun `a bundle is hashed once, and again when one of its files changes`() {
        val memory = File(root, "checked.json")
        val bundle = library.importZip("tiny", zip(files.toList()), CheckedBundles(memory))
        fun hashes(): Boolean {
            var hashed = false
            openBundle(bundle, CheckedBundles(memory)) { hashed = true }
            return hashed
        }
        assertTrue(!hashes(), "it was checked when it came in")
        val goldens = File(bundle, "goldens.json")
        goldens.setLastModified(goldens.lastModified() - 5000)
        assertTrue(hashes())
        assertTrue(!hashes())
        goldens.writeBytes(goldens.readBytes().also { it[9]++ })
        assertFailsWith<BundleException> { hashes() }
        goldens.writeBytes(files.getValue("goldens.json"))
        memory.writeText("{damaged")
        assertTrue(hashes())
        assertTrue(!hashes())
    }
}
