plugins {
    alias(libs.plugins.android.application)
    alias(libs.plugins.kotlin.android)
}

android {
    namespace = "gemma.demo"
    compileSdk = 35

    defaultConfig {
        applicationId = "gemma.demo"
        minSdk = 26
        targetSdk = 35
        versionCode = 1
        versionName = "0.1.0"
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_1_8
        targetCompatibility = JavaVersion.VERSION_1_8
    }
    kotlinOptions { jvmTarget = "1.8" }
    // Both runtimes contain the C++ library.
    packaging { jniLibs { pickFirsts += "**/libc++_shared.so" } }
}

dependencies {
    implementation(project(":core"))
    implementation(libs.onnxruntime)
    implementation(libs.executorch)
}
