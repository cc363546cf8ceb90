package gemma.core

/** What Android's `ActivityManager.MemoryInfo` says: the system ends apps in the background below the threshold. */
data class FreeMemory(val isLow: Boolean, val availableBytes: Long, val thresholdBytes: Long) {
    /** Low, or soon: a model can't be freed any more once the system ends the app. */
    internal val isScarce: Boolean get() = isLow || availableBytes < SPARE * thresholdBytes
}

/**
 * Whether to free an idle model when Android's `onTrimMemory` is called with a level.
 *
 * Until Android 13 the levels say how scarce memory is. From Android 14 on an app gets only UI_HIDDEN and BACKGROUND, each
 * time that it leaves the screen and however much memory is free: they alone say nothing.
 */
fun shouldUnload(trimLevel: Int, memory: FreeMemory): Boolean = when {
    trimLevel == RUNNING_CRITICAL || trimLevel >= MODERATE -> true
    trimLevel >= UI_HIDDEN -> memory.isScarce
    else -> false // the app is on the screen, and the system can still do without its memory
}

// Of Android's ComponentCallbacks2.
private const val RUNNING_CRITICAL = 15
private const val UI_HIDDEN = 20
private const val MODERATE = 60 // and above it COMPLETE; below it BACKGROUND

private const val SPARE = 2.0
