package android.app

import android.content.Context

/** As much of Android's Application as GemmaApplication needs to start on a desktop JVM. */
open class Application {
    protected open fun attachBaseContext(base: Context) = Unit

    /** Android calls this before anything else of the app runs. */
    fun attach(base: Context) = attachBaseContext(base)
}
