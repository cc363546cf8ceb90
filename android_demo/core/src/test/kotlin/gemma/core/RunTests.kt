package gemma.core

import org.junit.runner.Description
import org.junit.runner.JUnitCore
import org.junit.runner.notification.Failure
import org.junit.runner.notification.RunListener
import kotlin.system.exitProcess

/** Runs the named test classes, and prints how many tests passed, failed and were skipped. */
fun main(classes: Array<String>) {
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
    val result = core.run(*classes.map { Class.forName(it) }.toTypedArray())
    skipped.forEach(::println)
    val passed = result.runCount - result.failureCount - skipped.size
    println("kotlin: $passed passed, ${result.failureCount} failed, ${skipped.size} skipped")
    exitProcess(if (result.wasSuccessful()) 0 else 1)
}
