"""Names what is kept by a digest of all that it depends on."""

import hashlib

import msgspec


def digest_of(value: object) -> str:
    """The sha256 of a value as JSON, in hex."""
    return hashlib.sha256(msgspec.json.encode(value)).hexdigest()
