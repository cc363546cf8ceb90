#!/usr/bin/env bash
# Builds GemmaKit and runs its tests on Linux, and type-checks the files that only Apple's systems compile.
# Uses the installed Swift, else installs Debian 13's once into a folder in the cache (2.6 GB).
# If something is not available, prints why and skips its tests.
#   PYTHON=.venv/bin/python ios_demo/test.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/data/debian_packages.sh
export ORT_DISABLE_TELEMETRY=${ORT_DISABLE_TELEMETRY-1} ORT_TELEMETRY_DISABLED=${ORT_TELEMETRY_DISABLED-1}
root=$PWD
cache=${GEMMA_EXPORT_CACHE:-$HOME/.cache/gemma-export}
swift_root=$cache/swift-trixie
python=${PYTHON:-python3}
bridge=$root/build/ios-bridge
log=$root/build/ios-test.log
mkdir -p build "$cache"

skip() {
    echo "SKIPPED ios: $1"
    echo "swift: 0 passed, 0 failed, 1 skipped"
    exit 0
}

make_swift_root() {
    [ "$(id -u)" = 0 ] || skip "Swift is not installed, and installing it into a folder needs root"
    command -v debootstrap >/dev/null || install_packages debootstrap >/dev/null 2>&1 \
        || skip "Swift is not installed, and debootstrap could not be installed"
    local stage=$swift_root.partial mirror
    rm -rf "$stage"
    mirror=$(apt-get indextargets --format '$(SITE)' | sed -n 1p)
    echo "ios: fetching Debian 13's Swift into $swift_root, once"
    { debootstrap --variant=minbase --include=ca-certificates trixie "$stage" "$mirror" \
        && chroot "$stage" apt-get update -qq \
        && chroot "$stage" apt-get install -y -qq --no-install-recommends swiftlang libc6-dev libstdc++-14-dev \
        && chroot "$stage" apt-get clean; } >build/swift-root.log 2>&1 \
        || { rm -rf "$stage"; skip "Debian 13's Swift could not be fetched: $(tail -n 1 build/swift-root.log)"; }
    mv "$stage" "$swift_root"
}

# Runs a command in the folder with this repository at /gemma, in a mount namespace, so that nothing stays mounted.
in_swift_root() {
    mkdir -p "$swift_root/gemma"
    unshare -m bash -c '
        mount --bind /proc "$1/proc" && mount --bind /dev "$1/dev" && mount --bind "$2" "$1/gemma"
        shift 2
        exec chroot "$0" "$@"' "$swift_root" "$swift_root" "$root" "$@"
}

if command -v swift >/dev/null; then
    here=$root
    run() { "$@"; }
else
    [ -L "$swift_root/usr/bin/swift" ] || make_swift_root
    here=/gemma
    run() { in_swift_root "$@"; }
    run true 2>/dev/null || skip "mounting into $swift_root is not permitted"
fi

status=0
# Linux has no SwiftUI, Core ML and ExecuTorch, so all files are type-checked with stubs of these.
if run bash "$here/ios_demo/stubs/check.sh" "$here/build/ios-types" >build/ios-types.log 2>&1; then
    echo "ios: all Swift code type-checks in the language modes 5 and 6, with stubs for Apple's modules"
else
    grep -E "error:|warning:" build/ios-types.log | sort -u || tail -n 20 build/ios-types.log
    status=1
fi
"$python" ios_demo/stubs/check_coreml.py "$cache" || status=1
# Run inside of the folder: started in /, swift-format cuts a letter off absolute paths.
run env -C "$here/ios_demo" swift format lint --strict --recursive --configuration .swift-format \
    GemmaKit/Sources GemmaKit/Tests GemmaExecutorch GemmaDemo || status=1

# SwiftPM locks a file in TMPDIR that is named after the build folder; a folder of its own keeps checkouts apart.
mkdir -p build/ios-tmp
settings=("TMPDIR=$here/build/ios-tmp")
stop_servers() { [ -z "${servers:-}" ] || kill $servers 2>/dev/null || true; }
trap stop_servers EXIT
if command -v "$python" >/dev/null; then
    rm -f build/ios-downloads
    "$python" -m tests.data.download_server >build/ios-downloads &
    servers=$!
    for _ in $(seq 100); do [ -s build/ios-downloads ] || sleep 0.1; done
    settings+=("GEMMA_DOWNLOADS=$(cat build/ios-downloads)")
fi
if PYTHONPATH=export:runtime "$python" -c "import gemma_runtime" 2>/dev/null; then
    rm -rf "$bridge"
    mkdir -p "$bridge"
    mkfifo "$bridge/questions" "$bridge/answers"
    PYTHONPATH=export:runtime:. "$python" -m tests.data.session_bridge tests/data/tiny \
        "$bridge/questions" "$bridge/answers" --exact &
    servers="${servers:-} $!"
    settings+=("GEMMA_BRIDGE=$here/build/ios-bridge")
    PYTHONPATH=export:runtime:. "$python" -m tests.data.ios_vectors build/ios-vectors
    settings+=("GEMMA_IOS_VECTORS=$here/build/ios-vectors")
    if PYTHON=$python bash tests/data/genuine_tokenizers.sh build/ios-genuine 2>build/ios-genuine.log; then
        settings+=("GEMMA_GENUINE=$here/build/ios-genuine")
    else
        tail -n 1 build/ios-genuine.log
    fi
fi

# Copies ONNX Runtime's C library into the repository, which the Swift folder can see.
if [ "$(uname -sm)" = "Linux x86_64" ] && onnxruntime=$(bash tests/data/onnxruntime_aar.sh 2>build/ios-onnxruntime.log); then
    mkdir -p build/ios-onnxruntime
    cp -Ru "$onnxruntime/headers" "$onnxruntime/native" build/ios-onnxruntime
    rm -rf build/ios-home
    mkdir -p build/ios-home
    # The tests get an empty home folder, so that the check below finds files that the library leaves there.
    settings+=("GEMMA_ONNXRUNTIME=$here/build/ios-onnxruntime" "HOME=$here/build/ios-home")
else
    echo "SKIPPED ios: tests on ONNX Runtime's C library, which could not be fetched"
fi

# Swift 6.0's Observation library for Linux refers to a function that is missing but never called.
linking=(-Xlinker --allow-shlib-undefined)

# If the bridge dies, the tests wait at its pipes forever; hence the time limit.
run timeout 1200 env "${settings[@]}" swift test --disable-sandbox "${linking[@]}" --package-path "$here/ios_demo/GemmaKit" \
    --scratch-path "$here/build/ios" >"$log" 2>&1 || status=$?
grep -E "error:|warning:" "$log" || true
if [ -e build/ios-home/.cache/Microsoft ]; then
    echo "error: ONNX Runtime left usage data in the home folder; set ORT_DISABLE_TELEMETRY=1 before it is loaded"
    status=1
fi
passed=$(grep -c "^Test Case .* passed" "$log" || true)
failed=$(grep -c "^Test Case .* failed" "$log" || true)
skipped=$(grep -c "^Test Case .* skipped" "$log" || true)
grep "skipped:" "$log" || true
[ "$status" = 0 ] || [ "$failed" != 0 ] || tail -n 20 "$log"
echo "swift: $passed passed, $failed failed, $skipped skipped"
exit "$status"
