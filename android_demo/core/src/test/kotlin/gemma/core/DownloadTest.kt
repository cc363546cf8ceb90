package gemma.core

import org.junit.AfterClass
import org.junit.Assume.assumeTrue
import java.io.File
import java.io.IOException
import java.net.URL
import java.nio.file.Files
import java.util.UUID
import java.util.concurrent.CancellationException
import kotlin.concurrent.thread
import kotlin.test.AfterTest
import kotlin.test.Test
import kotlin.test.assertContains
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertNull
import kotlin.test.assertTrue

/** Downloads from `tests/data/download_server.py`, a hub whose repositories' names say what goes wrong. */
class DownloadTest {
    private val root = Files.createTempDirectory("download").toFile()
    private val folder = File(root, "bundles")
    private val memory = File(root, "checked.json")
    private var library = BundleLibrary(folder)
    private val owner = "o" + UUID.randomUUID().toString().replace("-", "")

    @AfterTest
    fun remove() {
        root.deleteRecursively()
    }

    private fun address(fault: String) = HubAddress("$owner/$fault", null)

    private fun download() = HubDownload(library, origin = origin(), plainHosts = setOf("127.0.0.1", "localhost"), timeoutMs = 500, pauseMs = 1)

    private fun run(fault: String, onProgress: (DownloadProgress) -> Unit = {}): File =
        download().run(address(fault), CheckedBundles(memory), onProgress)

    private fun refusal(fault: String): String {
        val message = assertFailsWith<DownloadException>(fault) { run(fault) }.message.orEmpty()
        assertEquals(emptyList(), library.bundles(), fault)
        assertTrue(root.walk().none { "evil" in it.name }, fault)
        return message
    }

    private fun assertWhole(bundle: File) {
        assertEquals(TINY.list().orEmpty().toSet(), bundle.list().orEmpty().toSet())
        openBundle(bundle) // reads all of it
        openBundle(bundle, CheckedBundles(memory)) { throw AssertionError("it was checked when it came in") }
        assertEquals(listOf(bundle), library.bundles())
        assertEquals(listOf(bundle.name), folder.list().orEmpty().toList())
    }

    /** The requests for a file: what each wanted. */
    private fun requests(fault: String, name: String = LARGE): List<JsonFields> {
        val log = JsonFields.parse("log", URL("${origin()}/log/$owner/$fault").readText()).list { it }
        return log.filter { it.of("name").string() == name }
    }

    private fun ranges(fault: String) = requests(fault).map { request -> request.orNull("Range")?.string() }

    @Test
    fun `a bundle is downloaded whole, all files from one commit, and tells nothing of the phone`() {
        val progress = ArrayList<DownloadProgress>()
        val bundle = run("whole") { progress += it }
        assertEquals("whole", bundle.name)
        assertWhole(bundle)
        val total = openBundle(bundle).manifest.files.values.sumOf { it.bytes }
        assertEquals(progress.sortedBy { it.doneBytes }, progress)
        assertEquals(DownloadProgress(total, total), progress.last())
        val request = requests("whole").single()
        assertEquals("main", requests("whole", MANIFEST).single().of("revision").string())
        assertEquals("c0ffee".repeat(6) + "cafe", request.of("revision").string())
        assertEquals("gemma-demo", request.of("User-Agent").string())
        for (name in listOf("Cookie", "Authorization", "Accept-Language")) assertNull(request.orNull(name))
        assertEquals("whole (2)", run("whole").name)
    }

    @Test
    fun `a cut connection goes on where it ended`() {
        assertWhole(run("cut"))
        assertEquals(listOf(null, "bytes=100000-", "bytes=200000-"), ranges("cut"))
        assertTrue(requests("cut").drop(1).all { it.of("If-Range").string().startsWith('"') })
    }

    @Test
    fun `a file that has changed, another range, a weak version and a refused range start it again`() {
        for ((fault, expected) in mapOf(
            "changed" to listOf(null, "bytes=100000-"),
            "lying" to listOf(null, "bytes=100000-", null),
            "weak" to listOf(null, null),
            "rangeless" to listOf(null, "bytes=100000-", null),
        )) {
            library.delete(run(fault).also(::assertWhole))
            assertEquals(expected, ranges(fault), fault)
        }
    }

    @Test
    fun `a download that was stopped is listed, kept by the next process, and goes on`() {
        val stopped = assertFailsWith<CancellationException> {
            run("whole") { if (it.doneBytes > 300_000) throw CancellationException("stopped") }
        }
        assertEquals("stopped", stopped.message)
        assertEquals(emptyList(), library.bundles())
        library = BundleLibrary(folder)
        val unfinished = library.unfinished().single()
        assertEquals("hub:$owner/whole", unfinished.address)
        assertTrue(unfinished.bytes > 300_000, "${unfinished.bytes}")
        assertWhole(download().run(HubAddress.parse(unfinished.address), CheckedBundles(memory)))
        assertEquals(listOf(false, true), ranges("whole").map { it.orEmpty().startsWith("bytes=") })
        assertEquals(1, requests("whole", "goldens.json").size, "whole files are not downloaded again")
        assertEquals(emptyList(), library.unfinished())
    }

    @Test
    fun `an unfinished download is deleted without a trace`() {
        refusal("failing")
        library.discard(library.unfinished().single())
        assertEquals(emptyList(), folder.list().orEmpty().toList())
    }

    @Test
    fun `a stalled download ends when it is stopped`() {
        val download = download()
        val work = thread {
            assertFailsWith<CancellationException> { download.run(address("stalled")) { if (it.doneBytes > 100_000) thread(block = download::stop) } }
        }
        work.join(10_000)
        assertTrue(!work.isAlive)
        assertEquals(1, library.unfinished().size)
    }

    @Test
    fun `a busy server is asked again, and one that always fails ends the download with its reason`() {
        library.delete(run("busy").also(::assertWhole))
        assertContains(refusal("failing"), "was interrupted")
        assertEquals(5, requests("failing").size)
    }

    @Test
    fun `altered, larger and smaller files are refused`() {
        assertContains(refusal("altered"), "$LARGE arrived altered")
        assertContains(refusal("longer"), "$LARGE has 262404 bytes, the manifest says 262400")
        assertContains(refusal("shorter"), "$LARGE has 262399 bytes")
        assertContains(refusal("flood"), "$LARGE has more bytes")
        assertContains(refusal("compressed"), "compressed")
        assertContains(refusal("endless"), "16777216 bytes")
        assertContains(refusal("many"), "more than 1000 files")
        assertContains(refusal("case"), "differ only in case")
    }

    @Test
    fun `redirects lead to other hosts, never to http or to files`() {
        library.delete(run("elsewhere").also(::assertWhole))
        assertEquals(2, requests("elsewhere").size)
        assertContains(refusal("plain"), "http://127.0.0.2, which is not encrypted")
        assertContains(refusal("local-file"), "file://")
        assertContains(refusal("loop"), "more than 10 times")
        val app = HubDownload(library, origin = origin())
        assertContains(assertFailsWith<DownloadException> { app.run(address("whole")) }.message.orEmpty(), "not encrypted")
    }

    @Test
    fun `no name leaves the bundle's folder or takes the manifest's place`() {
        for (fault in listOf("escape", "absolute", "backslash", "manifest", "long")) {
            assertContains(refusal(fault), "not a file inside of a bundle", message = fault)
        }
    }

    @Test
    fun `a bundle that doesn't fit is refused before its files are asked for`() {
        assertContains(refusal("vast"), "are still to be downloaded")
        library = BundleLibrary(folder) { 200_100_000L }
        assertContains(refusal("whole"), "0.00 GB are free")
        assertEquals(emptyList(), requests("vast") + requests("whole"))
    }

    @Test
    fun `what is not there and what is gated is said`() {
        assertContains(refusal("gated"), "private or gated")
        val missing = assertFailsWith<DownloadException> { download().run(HubAddress("$owner/whole", "v9")) }
        assertContains(missing.message.orEmpty(), "hub:$owner/whole@v9, or its manifest.json,")
    }

    @Test
    fun `addresses mean what they mean to gemma-runtime`() {
        json(File(DATA, "hub_names.json")).list { case ->
            val text = case.of("text").string()
            for (given in listOf(text, "hub:$text", " $text\n")) {
                val repository = case.orNull("repository")?.string()
                if (repository == null) {
                    assertContains(assertFailsWith<DownloadException>(given) { HubAddress.parse(given) }.message.orEmpty(), "hub:OWNER/NAME")
                } else {
                    assertEquals(HubAddress(repository, case.orNull("revision")?.string()), HubAddress.parse(given))
                }
            }
        }
        val address = HubAddress.parse("a/b@refs/pr/1")
        assertEquals(address, HubAddress.parse(address.toString()))
        assertEquals("$HUB/a/b/resolve/refs%2Fpr%2F1/x/a%20b%3F.bin", address.url(HUB, "refs/pr/1", "x/a b?.bin"))
    }

    companion object {
        private const val LARGE = "model.onnx.data"
        private var server: Process? = null
        private var port = ""

        /** Where the server is, which the first test starts. */
        private fun origin(): String {
            if (server == null) {
                val repository = DATA.absoluteFile.parentFile.parentFile
                server = try {
                    ProcessBuilder(System.getProperty("gemma.python") ?: "python3", "-m", "tests.data.download_server")
                        .directory(repository).redirectError(ProcessBuilder.Redirect.INHERIT).start()
                } catch (_: IOException) {
                    null
                }
                port = server?.inputStream?.bufferedReader()?.readLine().orEmpty()
            }
            assumeTrue("there is no Python to serve downloads", port.isNotEmpty())
            return "http://127.0.0.1:$port"
        }

        @JvmStatic
        @AfterClass
        fun endServer() {
            server?.destroy()
        }
    }
}
