"""Moves weights to huge pages, because decoding reads every weight for every token.

onnxruntime repacks weights onto the heap in pages of 4 KiB. A token touches tens of thousands of
pages, far more than the processor's TLB holds. Linux 6.1 and newer can move them to pages of 2 MiB
in place (madvise(2), MADV_COLLAPSE). Elsewhere this does nothing.
"""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

_HUGE = 2 << 20  # bytes
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_MAPS = Path("/proc/self/maps")


def use_huge_pages() -> int:
    """Request huge pages for every large private mapping; returns how many bytes got them."""
    if not sys.platform.startswith("linux") or not _MAPS.exists():
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    collapsed = 0
    for start, length in _writable_mappings():
        madvise(start, length, _MADV_HUGEPAGE)  # for pages that are not touched yet
        if madvise(start, length, _MADV_COLLAPSE) == 0:
            collapsed += length
    return collapsed


def _writable_mappings() -> Iterator[tuple[int, int]]:
    """Address and length of heap and anonymous memory, in whole huge pages."""
    for line in _MAPS.read_text().splitlines():
        addresses, access, _, _, _, *name = line.split()
        if not access.startswith("rw") or name not in ([], ["[heap]"]):
            continue
        first, last = (int(address, 16) for address in addresses.split("-"))
        first, last = -(-first // _HUGE) * _HUGE, last // _HUGE * _HUGE
        if last > first:
            yield first, last - first
