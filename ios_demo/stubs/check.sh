#!/usr/bin/env bash
# Type-checks all Swift code of the app, with the stubs beside this file for the modules that Linux lacks, in the
# language modes 5 and 6. Writes modules to the folder OUT. Prints what is wrong and exits with 1.
#   ios_demo/stubs/check.sh OUT
set -euo pipefail
out=$1
cd "$(dirname "$0")/.."
rm -rf "$out"
mkdir -p "$out/stubs"
status=0

# The stubs, in the order in which they import each other.
for module in Darwin os UIKit UniformTypeIdentifiers CoreML CoreAI ExecuTorch SwiftUI; do
    swiftc -emit-module -parse-as-library -module-name "$module" -I "$out/stubs" \
        -emit-module-path "$out/stubs/$module.swiftmodule" "stubs/$module.swift"
done

# check LANGUAGE MODULE FILE…: data races are found after the type check, in the compiler's SIL, which nobody reads. It goes
# to a file: the compiler replaces its output, as root even /dev/null.
check() {
    local language=$1 module=$2
    shift 2
    swiftc -wmo -emit-sil -o "$out/$language/$module.sil" -parse-as-library -module-name "$module" -swift-version "$language" \
        -warnings-as-errors -D GEMMA_STUBS -I "$out/stubs" -I "$out/$language" \
        -emit-module-path "$out/$language/$module.swiftmodule" "$@" || status=1
}

for language in 5 6; do
    mkdir -p "$out/$language"
    check "$language" GemmaKit GemmaKit/Sources/GemmaKit/*.swift
    check "$language" GemmaChat GemmaKit/Sources/GemmaChat/*.swift
    [ "$language" = 6 ] || check "$language" GemmaDemo GemmaDemo/*.swift # without ExecuTorch
    check "$language" GemmaExecutorch GemmaExecutorch/Sources/GemmaExecutorch/*.swift
    check "$language" GemmaDemo GemmaDemo/*.swift
done
exit "$status"
