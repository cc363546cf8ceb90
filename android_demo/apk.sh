# Builds, signs and checks an APK, and runs the core's tests on dex. test.sh sources this file after package.sh.

# A tool of Android's that Debian packages, in Java.
apksigner() {
    java -cp "$cache/apksigner/usr/share/java/apksigner.jar:$cache/libapksig-java/usr/share/java/apksig.jar" \
        com.android.apksigner.ApkSignerTool "$@"
}

fetch_enjarify() {
    debian_package enjarify bookworm || { echo "SKIPPED android dex: Debian's enjarify could not be fetched"; return 1; }
}

# undex DEX_OR_APK JAR: turns dex back into classes; every class, or it fails.
undex() {
    PYTHONPATH=$cache/enjarify/usr/lib/python3/dist-packages "$python" -O android_demo/undex.py "$@" >"$out/undex.log" 2>&1 \
        || { echo "FAILED android dex: $(tail -n 1 "$out/undex.log")"; exit 1; }
}

# Packs resources, dex and ONNX Runtime's arm64 libraries, and signs them with a key that is thrown away.
build_apk() {
    [ -e "$out/base.apk" ] || return 0
    command -v keytool >/dev/null || { echo "SKIPPED android APK: keytool is not installed"; return 0; }
    for package in apksigner libapksig-java; do
        debian_package $package bookworm || { echo "SKIPPED android APK: Debian's $package could not be fetched"; return 0; }
    done
    echo "SKIPPED android APK with ExecuTorch: its AAR and the libraries that it needs are in Maven's repository only"
    local verified size
    rm -f "$out"/{unsigned,app}.apk "$out/throwaway.jks"
    "$python" android_demo/pack_apk.py pack "$out/base.apk" "$out/dex.zip" "$onnxruntime/arm64" "$out/unsigned.apk"
    keytool -genkeypair -keystore "$out/throwaway.jks" -storepass throwaway -keyalg EC -dname CN=throwaway -validity 1 \
        2>"$out/keytool.log"
    apksigner sign --ks "$out/throwaway.jks" --ks-pass pass:throwaway --v1-signing-enabled false --v3-signing-enabled true \
        --out "$out/app.apk" "$out/unsigned.apk"
    rm "$out/throwaway.jks" "$out/unsigned.apk"
    verified=$(apksigner verify --verbose "$out/app.apk") || { echo "FAILED android APK: its signature is wrong"; exit 1; }
    for scheme in v2 v3; do
        grep -q "Verified using $scheme scheme.*: true" <<<"$verified" \
            || { echo "FAILED android APK: not signed by $scheme:"; echo "$verified"; exit 1; }
    done
    size=$("$python" android_demo/pack_apk.py check "$out/app.apk") || { echo "FAILED android APK: $size"; exit 1; }
    check_badging "$out/app.apk"
    ! fetch_enjarify || undex "$out/app.apk" "$out/app-apk.jar"
    echo "android APK: $size, signed by v2 and v3; its libraries can be mapped; never installed on a device"
}

# Runs the core's tests on the core as a phone gets it, which is dex, turned back into classes. The tests themselves stay as
# they are: the way back loses annotations.
test_dex() {
    fetch_enjarify || return 0
    mkdir -p "$out/dex"
    java "${quick[@]}" -cp "$cache/nativescript/vendor/aab-tool/bundletool.jar" com.android.tools.r8.D8 --release \
        --lib "$android" --classpath "$lib/kotlin-stdlib.jar" --min-api "$(gradle_value minSdk)" --output "$out/dex" \
        "$out/core.jar" >"$out/d8.log" 2>&1 \
        || { echo "FAILED android dex: $(grep -m 1 -i error "$out/d8.log"); see $out/d8.log"; exit 1; }
    undex "$out/dex/classes.dex" "$out/dex.jar"
    run_tests dex -Xverify:none "$out/dex.jar:$out/core-tests.jar:$jars" "${core_tests[@]}"
}
