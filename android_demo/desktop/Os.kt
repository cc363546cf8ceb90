package android.system

/** Android's Os over a map: a JVM cannot change the environment of its own process. */
object Os {
    val environment = HashMap<String, String>()

    @JvmStatic
    fun setenv(name: String, value: String, overwrite: Boolean) {
        if (overwrite || name !in environment) environment[name] = value
    }
}
