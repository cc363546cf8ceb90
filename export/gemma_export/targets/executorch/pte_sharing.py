"""Removes a duplicate from a `.pte`: a tensor stored both as constant and as named data."""

import struct
from pathlib import Path

from flatbuffers.encode import Write
from flatbuffers.number_types import Uint64Flags

from gemma_runtime.contents.pte_file import PteFile, Segment, open_pte, slot
from gemma_runtime.errors import TargetError

_LENGTH_AT = 32  # in the extended header
_COPY = 8 << 20  # bytes at a time


def share_constant(path: Path, key: str) -> None:
    """Point the named data at the constant with the same bytes, and cut the copy out."""
    with open_pte(path, writable=True) as pte:
        start, stop = _share(pte, key)
    _cut(path, start, stop)


def _share(pte: PteFile, key: str) -> tuple[int, int]:
    """Rewrite the offsets; returns the span (start, stop) of the copy to cut out.

    The offsets of later segments shrink by the length of that span.
    """
    named = pte.named(key)
    content = pte.named_data(key)
    constant = next((at for at in pte.constants() if _same(pte, at, content)), None)
    content.release()
    if constant is None:
        raise TargetError(f"the .pte has no constant with the bytes of {key}")
    behind = [s for s in pte.segments() if s.start > named.start]
    stop = min((s.start for s in behind), default=len(pte.data))
    gap = stop - named.start
    for segment in behind:
        _set_offset(pte, segment, segment.start - pte.base - gap)
    _set_offset(pte, named, constant - pte.base)
    struct.pack_into("<Q", pte.data, _LENGTH_AT, len(pte.data) - pte.base - gap)
    return named.start, stop


def _set_offset(pte: PteFile, segment: Segment, offset: int) -> None:
    at = segment.table.Pos + segment.table.Offset(slot(0))
    Write(Uint64Flags.packer_type, pte.data, at, offset)


def _same(pte: PteFile, at: int, content: memoryview) -> bool:
    return (
        pte.data[at : at + 64] == content[:64]
        and memoryview(pte.data)[at : at + len(content)] == content
    )


def _cut(path: Path, start: int, stop: int) -> None:
    with path.open("r+b") as file:
        while True:
            file.seek(stop)
            block = file.read(_COPY)
            if not block:
                break
            file.seek(start)
            file.write(block)
            start, stop = start + len(block), stop + len(block)
        file.truncate(start)
