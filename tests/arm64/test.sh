#!/usr/bin/env bash
# Tests tiny bundles on emulated 64-bit ARM, with the published onnxruntime and executorch wheels.
# QEMU emulates three processors: without dot products, with them (sdot), and with matrix products
# too (smmla). gemma_native is cross-compiled, using runtime/native/aarch64-linux-gnu.cmake.
# The emulator, a Python, a compiler and the wheels come from Debian and PyPI into a cache (470 MB).
# If one can't be fetched, the script prints why and skips the checks that need it.
#   PYTHON=.venv/bin/python tests/arm64/test.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
export ORT_DISABLE_TELEMETRY=${ORT_DISABLE_TELEMETRY-1} ORT_TELEMETRY_DISABLED=${ORT_TELEMETRY_DISABLED-1}
source tests/data/debian_packages.sh
unset PYTHONDONTWRITEBYTECODE GEMMA_NATIVE # keep bytecode for fast imports; use the runner built here
root=$PWD
cache=${GEMMA_EXPORT_CACHE:-$HOME/.cache/gemma-export}/arm64
python=${PYTHON:-python3}
out=$root/build/arm64
cpus=(cortex-a53 cortex-a76 max)
skipped=0
rm -rf "$out"
mkdir -p "$cache" "$out"
# A cache of its own, apart from the user's.
export GEMMA_EXPORT_CACHE=$out/cache PYTHONPATH=$root/export:$root/runtime:$root

skip() {
    echo "SKIPPED arm64: $1"
    echo "arm64: 0 passed, 0 failed, 1 skipped"
    exit 0
}

# debian PART SUITE ARCHITECTURE TAR_ARGUMENTS NAME…: fetches packages into the folder PART of the cache.
debian() {
    local part=$1
    shift
    debian_packages "$cache/$part" "$@" 2>>"$out/fetch.log"
}

# Writes the requirements for ARM: our dependencies, and onnxruntime and executorch in the versions
# installed here. Prints the name of the wheel folder and the executorch requirement.
wheel_folder() {
    "$python" - <<'PYTHON'
import tomllib
from hashlib import sha256
from importlib.metadata import version

with open("pyproject.toml", "rb") as file:
    requirements = tomllib.load(file)["project"]["dependencies"]
requirements.append(f"onnxruntime=={version('onnxruntime')}")
with open("build/arm64/requirements.txt", "w") as file:
    file.write("\n".join(requirements))
executorch = f"executorch=={version('executorch')}"
key = sha256("\n".join([*requirements, executorch]).encode()).hexdigest()[:12]
print(f"wheels-{key} {executorch}")
PYTHON
}

# wheels FOLDER EXECUTORCH: installs the ARM wheels into a folder of the cache.
wheels() {
    [ -d "$cache/$1" ] && return
    local stage install
    stage=$(mktemp -d -p "$cache")
    install=("$python" -m pip install --quiet --no-compile --target "$stage/root" --python-version 3.11
        --only-binary=:all: --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64
        --platform manylinux2014_aarch64)
    { "${install[@]}" --requirement "$out/requirements.txt" && "${install[@]}" --no-deps "$2"; } \
        >>"$out/fetch.log" 2>&1 || { rm -rf "$stage"; return 1; }
    mv -T "$stage/root" "$cache/$1" || [ -d "$cache/$1" ]
    rm -rf "$stage"
}

[ "$(uname -sm)" = "Linux x86_64" ] || skip "needs Linux on x86_64; this is $(uname -sm)"
for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || skip "$tool is not installed"
done
"$python" -c "import executorch, onnxruntime, torch, transformers" 2>/dev/null \
    || skip "$python has no onnxruntime, executorch or transformers; run: pip install -e '.[dev]'"

# The emulator of Debian 12 (7.2) crashes on `import onnxruntime`.
debian qemu trixie amd64 ./usr/bin/qemu-aarch64 qemu-user \
    || skip "can't fetch qemu-user of Debian 13: $(tail -n 1 "$out/fetch.log")"
debian python bookworm arm64 --exclude=./usr/share/doc libc6 libgcc-s1 libstdc++6 \
    python3.11-minimal libpython3.11-minimal libpython3.11-stdlib zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 \
    liblzma5 libuuid1 \
    || skip "can't fetch the arm64 Python of Debian 12: $(tail -n 1 "$out/fetch.log")"
read -r wheels executorch <<<"$(wheel_folder)"
wheels "$wheels" "$executorch" || skip "can't fetch the wheels for arm64: $(tail -n 1 "$out/fetch.log")"

fetch_compiler() {
    debian compiler bookworm amd64 "--exclude=./usr/share/doc --exclude=lto1 --exclude=*lto-dump-12" \
        g++-12-aarch64-linux-gnu gcc-12-aarch64-linux-gnu cpp-12-aarch64-linux-gnu binutils-aarch64-linux-gnu \
        libbinutils libc6-dev-arm64-cross libc6-arm64-cross linux-libc-dev-arm64-cross libgcc-12-dev-arm64-cross \
        libgcc-s1-arm64-cross libstdc++-12-dev-arm64-cross libstdc++6-arm64-cross libisl23 libmpfr6 libmpc3 \
        libgmp10 libjansson4 libzstd1
}

cross_compile() {
    export PATH # only here: the caller runs this in a subshell
    PATH=$(dirname "$(command -v "$python")"):$cache/compiler/usr/bin:$PATH
    export LD_LIBRARY_PATH=$cache/compiler/usr/lib/x86_64-linux-gnu
    cmake -S runtime/native -B "$out/native" -DCMAKE_SYSROOT="$cache/compiler" \
        -DCMAKE_TOOLCHAIN_FILE="$root/runtime/native/aarch64-linux-gnu.cmake" \
        -DCMAKE_PREFIX_PATH="$cache/$wheels/executorch" \
        && cmake --build "$out/native" && cmake --install "$out/native" --prefix "$out/board"
}

emulator=$cache/qemu/usr/bin/qemu-aarch64
export QEMU_LD_PREFIX=$cache/python

# counted COUNTS COMMAND…: runs a command in the emulator; writes counts of the translated instructions.
counted() {
    local counts=$1 status=0
    shift
    timeout 600 "$emulator" -d in_asm \
        -D >(grep -oE '[[:space:]](fmla|smlal|sdot|smmla)[[:space:]]' | sort | uniq -c >"$counts") "$@" || status=$?
    wait $!
    return $status
}

"$python" -m tests.arm64.make_bundles "$out/bundles" >"$out/export.log" 2>&1 || { tail "$out/export.log"; exit 1; }
bundles=(tests/data/tiny "$out"/bundles/onnx-*)
program=$out/bundles/executorch-int4/model.pte
if fetch_compiler; then
    (cross_compile) >"$out/native.log" 2>&1 || { tail "$out/native.log"; exit 1; }
    bundles+=("$out/bundles/executorch-int4")
    native=$("$python" -c "from gemma_runtime.backends.executorch_native import build_native; print(build_native())")
    # An emulated program can't start an ARM program directly, so this script starts the emulator.
    printf '#!/bin/sh\nexec "%s" "%s" "$@"\n' "$emulator" "$out/board/gemma_native" >"$out/emulated_native"
    chmod +x "$out/emulated_native"
else
    echo "SKIPPED arm64 executorch: can't fetch Debian's cross compiler: $(tail -n 1 "$out/fetch.log")"
    skipped=1
fi

GEMMA_NATIVE=${native:-} "$python" -m tests.arm64.answers "$out/x86.json" "${bundles[@]}"
for cpu in "${cpus[@]}"; do
    export QEMU_CPU=$cpu
    GEMMA_NATIVE=$out/emulated_native counted "$out/$cpu.onnxruntime.kernels" \
        -E PYTHONHOME="$cache/python/usr" -E PYTHONPATH="$root/runtime:$root:$cache/$wheels" \
        "$cache/python/usr/bin/python3.11" -m tests.arm64.answers "$out/$cpu.json" --like "$out/x86.json" \
        "${bundles[@]}" >"$out/$cpu.log" 2>&1 || rm -f "$out/$cpu.json"
    [ $skipped = 1 ] || counted "$out/$cpu.executorch.kernels" "$out/board/gemma_native" "$program" 1 16 64 2 300 301 \
        >"$out/$cpu.tokens" 2>"$out/$cpu.native.log" || true
done
"$python" -m tests.arm64.judge "$out" $skipped "${cpus[@]}"
