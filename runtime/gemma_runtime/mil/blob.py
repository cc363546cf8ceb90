"""Reads Core ML's weight file, `weight.bin`. The model refers to a tensor by its record's offset.

Layout, from coremltools' MILBlob headers: a header of 64 bytes (count, version), then records of
64 bytes. A record holds a sentinel, the type, the size in bytes and the offset of the data, all
little-endian.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.errors import SessionError

Array = NDArray[np.generic]

_SENTINEL = 0xDEADBEEF
_RECORD = struct.Struct("<IIQQ")  # sentinel, type, size in bytes, offset of the data
# Type codes of MILBlob. int4 and uint4 are packed two per byte, the first value in the low bits.
_NUMPY_TYPES: dict[int, np.dtype[np.generic]] = {
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


@dataclass(frozen=True, slots=True, eq=False)
class Nibbles:
    """A packed tensor of 4-bit integers."""

    packed: NDArray[np.uint8]  # (⌈values / 2⌉,)
    shape: tuple[int, ...]
    signed: bool

    def unpack(self) -> NDArray[np.int8] | NDArray[np.uint8]:
        values = unpack_nibbles(self.packed, self.signed)
        return values[: math.prod(self.shape)].reshape(self.shape)


class WeightFile:
    """`weight.bin`, mapped into memory."""

    def __init__(self, path: Path) -> None:
        """Raises SessionError if the file is missing or empty."""
        self._path = path
        try:
            self._bytes = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:  # ValueError: empty
            raise SessionError(f"{path} can't be read: {error}; export the model again") from error

    def read(self, offset: int, shape: tuple[int, ...]) -> Array | Nibbles:
        """The tensor whose record starts at `offset`. Raises SessionError for a damaged file."""
        if offset + _RECORD.size > len(self._bytes):
            raise self._damaged(f"no record at byte {offset}")
        sentinel, kind, size, start = _RECORD.unpack_from(self._bytes.data, offset)
        if sentinel != _SENTINEL or start + size > len(self._bytes):
            raise self._damaged(f"no record at byte {offset}")
        if kind not in _NUMPY_TYPES and kind not in (_INT4, _UINT4):
            raise self._damaged(f"the record at byte {offset} has the unknown type {kind}")
        width = _NUMPY_TYPES[kind].itemsize * 8 if kind in _NUMPY_TYPES else 4
        count = math.prod(shape)
        if count * width > size * 8:
            stored = size * 8 // width
            raise self._damaged(f"{stored} values at byte {offset}, the model expects {count}")
        data = self._bytes[start : start + (count * width + 7) // 8]
        if kind in _NUMPY_TYPES:
            return data.view(_NUMPY_TYPES[kind]).reshape(shape)
        return Nibbles(data, shape, kind == _INT4)

    def _damaged(self, reason: str) -> SessionError:
        return SessionError(f"{self._path}: {reason}; export the model again")


def unpack_nibbles(data: NDArray[np.uint8], signed: bool) -> NDArray[np.int8] | NDArray[np.uint8]:
    """Unpack two values per byte, low half first; signed values are two's complement."""
    values = np.stack((data & 0xF, data >> 4), axis=-1).reshape(-1)
    return (values ^ 8).astype(np.int8) - np.int8(8) if signed else values
