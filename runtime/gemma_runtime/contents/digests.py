"""The digest of a model's codes, equal for every container."""

import hashlib
from collections.abc import Iterable


def combine_digests(lines: Iterable[str]) -> str:
    """sha256 over `NAME FORMAT DIGEST` lines in sorted order."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def parts_digest(parts: Iterable["hashlib._Hash"]) -> str:
    """One weight's digest: sha256 over the digests of codes, scales and zero points."""
    return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()
