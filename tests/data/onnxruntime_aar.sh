#!/usr/bin/env bash
# Fetches the parts of ONNX Runtime that the apps' tests need into the cache; prints the folder.
#   classes.jar, headers/ and native/libonnxruntime4j_jni.so (x86-64) of Android's AAR, and next to the
#   latter Linux's library of the same version: native/libonnxruntime.so
# All come from a Unity plugin in npm.
set -euo pipefail
folder=${GEMMA_EXPORT_CACHE:-$HOME/.cache/gemma-export}/android/onnxruntime-1.29.0
if [ ! -d "$folder" ]; then
    command -v npm >/dev/null && command -v unzip >/dev/null
    mkdir -p "$(dirname "$folder")"
    stage=$(mktemp -d -p "$(dirname "$folder")")
    trap 'rm -rf "$stage"' EXIT
    cd "$stage"
    npm pack --silent com.github.asus4.onnxruntime@0.4.9 >/dev/null
    tar xzf ./*.tgz package/Plugins/Android/onnxruntime.aar package/Plugins/Linux/x64/libonnxruntime.so
    mkdir made
    unzip -qo package/Plugins/Android/onnxruntime.aar classes.jar 'headers/*' jni/x86_64/libonnxruntime4j_jni.so -d made
    mv made/jni/x86_64 made/native
    rmdir made/jni
    mv package/Plugins/Linux/x64/libonnxruntime.so made/native
    ln -s libonnxruntime.so made/native/libonnxruntime.so.1
    mv made "$folder"
fi
echo "$folder"
