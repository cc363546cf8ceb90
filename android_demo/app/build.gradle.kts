plugins {
    alias(libs.plugins.android.application)
}

android {
    namespace = "gemma.demo"
    compileSdk = 37

    defaultConfig {
        applicationId = "gemma.demo"
        minSdk = 26
        targetSdk = 37
        versionCode = 1
        versionName = "0.1.0"
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }
        // The library doesn't tell its version, which a bundle may require.
        buildConfigField("String", "EXECUTORCH_VERSION", "\"${libs.versions.executorch.get()}\"")
    }
    buildFeatures { buildConfig = true }

    // For a signed release: -Pkeystore=FILE -PkeystorePassword=… -PkeyAlias=…
    val keystore = providers.gradleProperty("keystore").orNull
    if (keystore != null) {
        signingConfigs.create("release") {
            storeFile = file(keystore)
            storePassword = providers.gradleProperty("keystorePassword").get()
            keyAlias = providers.gradleProperty("keyAlias").get()
            keyPassword = storePassword
        }
    }
    buildTypes.named("release") {
        isMinifyEnabled = true
        isShrinkResources = true
        proguardFiles(getDefaultProguardFile("proguard-android-optimize.txt"), "proguard-rules.pro")
        signingConfig = signingConfigs.findByName("release")
    }

    compileOptions { // of Kotlin too
        sourceCompatibility = JavaVersion.VERSION_1_8
        targetCompatibility = JavaVersion.VERSION_1_8
    }
}

dependencies {
    implementation(project(":core"))
    implementation(libs.onnxruntime)
    implementation(libs.executorch)
}
