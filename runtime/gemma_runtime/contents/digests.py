"""The digest of a model's codes: the same whoever computes it, and from whichever container."""

import hashlib
from collections.abc import Iterable


def combine_digests(lines: Iterable[str]) -> str:
    """sha256 over `NAME FORMAT DIGEST` lines in sorted order."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def parts_digest(parts: Iterable["hashlib._Hash"]) -> str:
    """Of one weight: sha256 over the digests of codes, scales and zero points."""
    return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()
