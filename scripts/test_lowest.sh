#!/usr/bin/env bash
# Runs the runtime's tests with the lowest version of each dependency that pyproject.toml allows, without torch.
# The environment is made anew in build/lowest. Only wheels are taken: a bound that has to be compiled is too low.
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
    assert bound and "," not in version, f"{line}: expected one lower bound"
    print(f"{name}=={version}")
PYTHON

if ! "$python" -m pip index versions pip >/dev/null 2>&1; then
    echo "SKIPPED lowest: the package index can't be reached"
    exit 0
fi
pip=("$out/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" --only-binary=:all: --requirement "$out/requirements.txt" pytest pytest-timeout hypothesis
"${pip[@]}" --no-deps --editable .
paste -sd ' ' "$out/requirements.txt"

# Bundles and packages of these tests never meet the user's.
unset PYTHONPATH PYTHONDONTWRITEBYTECODE
GEMMA_EXPORT_CACHE=${GEMMA_EXPORT_CACHE:-$out/cache} \
    "$out/venv/bin/python" -m pytest tests/runtime -m "not serial" -p no:cacheprovider
