package gemma.demo

import android.system.Os

/**
 * Opts out of the usage data that ONNX Runtime 1.29 and later collects by default: a device id and an event
 * database in the app's storage, and uploads. The library reads the variables once, when it starts. Its AAR has a
 * content provider that loads it, and providers start before `onCreate`: call this in `attachBaseContext`.
 * A variable that is already set keeps its value.
 */
internal fun disableTelemetry() {
    for (name in TELEMETRY_VARIABLES) Os.setenv(name, "1", false)
}

internal val TELEMETRY_VARIABLES = listOf("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED") // new and old name
