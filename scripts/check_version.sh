#!/usr/bin/env bash
# Checks that all projects and the changelog have this version.
#   scripts/check_version.sh 0.2.0
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?give the version, such as 0.2.0}
for file in pyproject.toml {optimum_hook,conformance}/pyproject.toml; do
    grep -qx "version = \"$version\"" "$file" || { echo "error: the version in $file is not $version" >&2; exit 1; }
done
grep -qE "^## \[${version//./\\.}\] - [0-9]{4}-[0-9]{2}-[0-9]{2}$" CHANGELOG.md \
    || { echo "error: CHANGELOG.md has no heading '## [$version] - YYYY-MM-DD'" >&2; exit 1; }
