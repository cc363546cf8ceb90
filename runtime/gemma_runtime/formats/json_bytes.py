"""Decodes JSON of untrusted files: whatever is wrong with it is a DecodeError."""

from typing import TypeVar

import msgspec

T = TypeVar("T")


def decode_json(content: bytes | str, kind: type[T]) -> T:
    """The value as `kind`. Raises msgspec.DecodeError, also for what msgspec raises others for:
    bytes that are not UTF-8, and nesting beyond Python's limit of recursion.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except RecursionError as error:
        raise msgspec.DecodeError("the nesting is too deep") from error
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError(f"byte {error.start} of a text is not UTF-8") from error
