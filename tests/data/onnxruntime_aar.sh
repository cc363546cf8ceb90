#!/usr/bin/env bash
# Fetches the parts of ONNX Runtime that the apps' tests need into the cache, and prints the folder:
#   classes.jar, headers/, native/libonnxruntime4j_jni.so   from the Android AAR (x86-64)
#   native/libonnxruntime.so                                the Linux library of the same version
#   arm64/                                                  the AAR's libraries for phones
# The source is a Unity plugin on npm.
set -euo pipefail
folder=${GEMMA_EXPORT_CACHE:-$HOME/.cache/gemma-export}/android/onnxruntime-1.29.0
if [ ! -d "$folder/arm64" ]; then
    command -v npm >/dev/null && command -v unzip >/dev/null
    mkdir -p "$(dirname "$folder")"
    stage=$(mktemp -d -p "$(dirname "$folder")")
    trap 'rm -rf "$stage"' EXIT
    cd "$stage"
    npm pack --silent com.github.asus4.onnxruntime@0.4.9 >/dev/null
    tar xzf ./*.tgz package/Plugins/Android/onnxruntime.aar package/Plugins/Linux/x64/libonnxruntime.so
    mkdir made
    unzip -qo package/Plugins/Android/onnxruntime.aar classes.jar 'headers/*' jni/x86_64/libonnxruntime4j_jni.so \
        'jni/arm64-v8a/*' -d made
    mv made/jni/x86_64 made/native
    mv made/jni/arm64-v8a made/arm64
    rmdir made/jni
    mv package/Plugins/Linux/x64/libonnxruntime.so made/native
    ln -s libonnxruntime.so made/native/libonnxruntime.so.1
    [ ! -e "$folder" ] || mv "$folder" "$stage/old"
    mv made "$folder"
fi
echo "$folder"
