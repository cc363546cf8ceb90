package gemma.demo

import android.content.Context
import android.system.Os
import gemma.core.DATA
import gemma.core.TINY
import gemma.core.openBundle
import org.junit.After
import org.junit.Assume.assumeTrue
import org.w3c.dom.Element
import java.io.File
import java.nio.file.Files
import javax.xml.parsers.DocumentBuilderFactory
import kotlin.test.Test
import kotlin.test.assertEquals

class TelemetryTest {
    @After
    fun clear() = Os.environment.clear()

    @Test
    fun `the app opts out of telemetry before it can load ONNX Runtime`() {
        GemmaApplication().attach(Context())
        assertEquals(mapOf("ORT_DISABLE_TELEMETRY" to "1", "ORT_TELEMETRY_DISABLED" to "1"), Os.environment.toMap())
        Os.environment["ORT_DISABLE_TELEMETRY"] = "0"
        GemmaApplication().attach(Context())
        assertEquals("0", Os.environment["ORT_DISABLE_TELEMETRY"])
    }

    @Test
    fun `the manifest removes what ONNX Runtime's library adds for telemetry`() {
        val file = File(DATA, "../../android_demo/app/src/main/AndroidManifest.xml")
        val elements = DocumentBuilderFactory.newInstance().newDocumentBuilder().parse(file).getElementsByTagName("*")
        val removed = (0 until elements.length).map { elements.item(it) as Element }
            .filter { it.getAttribute("tools:node") == "remove" }
            .map { it.getAttribute("android:name") }
        assertEquals(listOf("ai.onnxruntime.TelemetryInitializer"), removed)
    }

    @Test
    fun `with the app's environment ONNX Runtime leaves no file behind`() {
        val library = System.getProperty("onnxruntime.native.path")
        assumeTrue("ONNX Runtime's native library for this machine is not available", library != null)
        GemmaApplication().attach(Context())
        check(Os.environment["ORT_DISABLE_TELEMETRY"] == "1") // else the child would collect usage data
        val home = Files.createTempDirectory("home").toFile()
        try {
            runModel(home, library)
            assertEquals(emptyList(), home.walk().filter { it != home }.toList())
        } finally {
            home.deleteRecursively()
        }
    }

    /** Runs `main` below in a process whose environment is the app's, its home and its folder. */
    private fun runModel(home: File, library: String) {
        val java = File(System.getProperty("java.home"), "bin/java").path
        val classes = System.getProperty("java.class.path").split(File.pathSeparator).joinToString(File.pathSeparator) {
            File(it).absolutePath
        }
        val process = ProcessBuilder(
            java, "-Donnxruntime.native.path=$library", "-cp", classes, "gemma.demo.TelemetryTestKt", TINY.absolutePath,
        ).directory(home).inheritIO()
        process.environment().apply {
            clear()
            putAll(Os.environment)
            put("HOME", home.path)
            put("LD_LIBRARY_PATH", library)
        }
        assertEquals(0, process.start().waitFor())
    }
}

fun main(arguments: Array<String>) {
    OnnxEngine(openBundle(File(arguments.single())), "decode", 1, TEMPORARY).use { it.run(intArrayOf(2), 0, 1) }
}
