package gemma.core

import org.junit.runner.Description
import org.junit.runner.JUnitCore
import org.junit.runner.notification.Failure
import org.junit.runner.notification.RunListener
import kotlin.system.exitProcess

/** Runs the core's tests and the named test classes, and prints how many passed, failed and were skipped. */
fun main(more: Array<String>) {
    val skipped = ArrayList<String>()
    val core = JUnitCore()
    core.addListener(object : RunListener() {
        override fun testAssumptionFailure(failure: Failure) {
            skipped += "SKIPPED ${failure.description.methodName}: ${failure.message}"
        }

        override fun testFailure(failure: Failure) {
            println("FAILED ${failure.description.displayName}\n${failure.trimmedTrace}")
        }

        override fun testIgnored(description: Description) {
            skipped += "SKIPPED ${description.methodName}"
        }
    })
    val result = core.run(
        VectorsTest::class.java,
        BundleTest::class.java,
        MutationTest::class.java,
        LibraryTest::class.java,
        DownloadTest::class.java,
        SessionTest::class.java,
        DraftTest::class.java,
        ThreadsTest::class.java,
        ConversationTest::class.java,
        SavedChatsTest::class.java,
        MarkdownTest::class.java,
        TinyModelTest::class.java,
        StructuredTest::class.java,
        GrammarTest::class.java,
        LatencyMeterTest::class.java,
        VerifyTest::class.java,
        *more.map { Class.forName(it) }.toTypedArray(),
    )
    skipped.forEach(::println)
    val passed = result.runCount - result.failureCount - skipped.size
    println("kotlin: $passed passed, ${result.failureCount} failed, ${skipped.size} skipped")
    exitProcess(if (result.wasSuccessful()) 0 else 1)
}
