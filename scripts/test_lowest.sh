#!/usr/bin/env bash
# Runs the runtime's tests with the lowest allowed version of each dependency, without torch.
# Creates a fresh environment in build/lowest. Installs wheels only: a version without a wheel is too low.
#   PYTHON=python3.11 scripts/test_lowest.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=$PWD/build/lowest
rm -rf "$out"
mkdir -p "$out"
"$python" -m venv "$out/venv"

"$python" - >"$out/requirements.txt" <<'PYTHON'
import tomllib

with open("pyproject.toml", "rb") as file:
    dependencies = tomllib.load(file)["project"]["dependencies"]
for line in dependencies:
    name, bound, version = line.partition(">=")
    assert bound and "," not in version, f"{line}: expected exactly one lower bound"
    print(f"{name}=={version}")
PYTHON

if ! "$python" -m pip index versions pip >/dev/null 2>&1; then
    echo "SKIPPED lowest: can't reach the package index"
    exit 0
fi
pip=("$out/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" --only-binary=:all: --requirement "$out/requirements.txt" pytest pytest-timeout hypothesis
"${pip[@]}" --no-deps --editable .
paste -sd ' ' "$out/requirements.txt"

# A cache of its own, and no packages from the caller's environment.
unset PYTHONPATH PYTHONDONTWRITEBYTECODE
GEMMA_EXPORT_CACHE=${GEMMA_EXPORT_CACHE:-$out/cache} \
    "$out/venv/bin/python" -m pytest tests/runtime -m "not serial" -p no:cacheprovider
