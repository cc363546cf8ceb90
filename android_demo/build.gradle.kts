// The Android plugin compiles Kotlin itself, with the newest version that is named here.
plugins {
    alias(libs.plugins.android.application) apply false
    alias(libs.plugins.kotlin.jvm) apply false
}
