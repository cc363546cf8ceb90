#!/usr/bin/env bash
# Writes .github/release-tools.txt: the newest versions of the release's tools, each with the hashes of PyPI's files.
# Run it with the release's Python, 3.11 on Linux, in an environment with pip-tools.
#   scripts/lock_release_tools.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_CONFIG_FILE=/dev/null CUSTOM_COMPILE_COMMAND=scripts/lock_release_tools.sh
unset PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_CONSTRAINT
pip-compile --quiet --upgrade --generate-hashes --allow-unsafe --strip-extras --no-emit-index-url \
    --no-emit-trusted-host --output-file .github/release-tools.txt .github/release-tools.in
