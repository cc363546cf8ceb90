"""Core ML's weight file: tensors behind records of 64 bytes, found by offset.

Layout, from coremltools' MILBlob headers: a header of 64 bytes (count, version); each record has a
sentinel, the type, the size in bytes and the offset of its data, all little-endian.
"""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.errors import SessionError

Array = NDArray[np.generic]

_SENTINEL = 0xDEADBEEF
# Type codes of MILBlob. Narrow ones are packed, the earlier value in the lower bits.
_WHOLE: dict[int, np.dtype[np.generic]] = {
    1: np.dtype(np.float16),
    2: np.dtype(np.float32),
    3: np.dtype(np.uint8),
    4: np.dtype(np.int8),
    6: np.dtype(np.int16),
    7: np.dtype(np.uint16),
    14: np.dtype(np.int32),
    15: np.dtype(np.uint32),
}
_INT4, _UINT4 = 8, 11


class WeightFile:
    """`weight.bin`, mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes = np.memmap(path, np.uint8, "r")

    def read(self, offset: int, shape: tuple[int, ...]) -> Array:
        """The tensor of the record at `offset`. Raises SessionError for a damaged file."""
        if offset + 32 > len(self._bytes):
            raise self._damaged(f"no record at byte {offset}")
        sentinel, kind, size, start = struct.unpack_from("<IIQQ", self._bytes.data, offset)
        if sentinel != _SENTINEL or start + size > len(self._bytes):
            raise self._damaged(f"no record at byte {offset}")
        data = self._bytes[start : start + size]
        count = int(np.prod(shape, dtype=np.int64))
        if kind in _WHOLE:
            values: Array = data.view(_WHOLE[kind])
        elif kind in (_INT4, _UINT4):
            values = unpack_nibbles(data, signed=kind == _INT4)
        else:
            raise self._damaged(f"type {kind} at byte {offset} is not known here")
        if len(values) < count:
            raise self._damaged(f"{len(values)} values at byte {offset}, the model expects {count}")
        return values[:count].reshape(shape)

    def _damaged(self, what: str) -> SessionError:
        return SessionError(f"{self._path}: {what}; export the model again")


def unpack_nibbles(data: NDArray[np.uint8], signed: bool) -> NDArray[np.int8] | NDArray[np.uint8]:
    """Two values per byte, the earlier one in the low half; signed ones in two's complement."""
    values = np.stack((data & 0xF, data >> 4), axis=-1).reshape(-1)
    return (values ^ 8).astype(np.int8) - np.int8(8) if signed else values
