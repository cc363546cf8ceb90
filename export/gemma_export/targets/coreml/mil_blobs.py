"""Writes Core ML's weight file tensor by tensor, with one block of rows in memory.

coremltools' own writer takes whole arrays with one byte per code; this one copies the store's
packed bytes. `gemma_runtime.mil.blob` reads the file and describes its layout.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.codes import pack, unpack
from gemma_export.quantize.store import StoredWeight
from gemma_export.targets.shared.float16 import check_scales, half

_ALIGNMENT = 64
_VERSION = 2
_SENTINEL = 0xDEADBEEF
# MILBlob's type numbers.
FLOAT16, UINT8, INT8, INT4, UINT4 = 1, 3, 4, 8, 11


@dataclass(frozen=True, slots=True)
class Blob:
    """One tensor of the weight file; its bytes are read when the file is written."""

    kind: int  # MILBlob's type number
    bytes: int
    blocks: Callable[[], Iterator[NDArray[np.uint8]]]


class BlobFile:
    """`weight.bin` while it is being written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._count = 0
        self._file.write(bytes(_ALIGNMENT))  # the header, written last, when the count is known

    def add(self, blob: Blob) -> int:
        """Write one tensor; returns the offset of its record."""
        place = self._file.tell()
        record = struct.pack("<IIQQ", _SENTINEL, blob.kind, blob.bytes, place + _ALIGNMENT)
        self._file.write(record.ljust(_ALIGNMENT, b"\0"))
        for block in blob.blocks():
            self._file.write(block.data)
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        self._count += 1
        return place

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.seek(0)
        self._file.write(struct.pack("<II", self._count, _VERSION))
        self._file.close()


def code_blob(weight: StoredWeight) -> Blob:
    """Codes in Core ML's signed types (top bit flipped), or unsigned if there are zero points."""
    fmt, (rows, width) = weight.format, weight.shape
    kinds = {4: (INT4, UINT4), 8: (INT8, UINT8)}[fmt.bits]
    flip = 0 if fmt.asymmetric else {4: 0x88, 8: 0x80}[fmt.bits]
    blocks = _streamed(weight, lambda start, stop: weight.part("codes", start, stop) ^ flip)
    return Blob(kinds[fmt.asymmetric], rows * width * fmt.bits // 8, blocks)


def scale_blob(weight: StoredWeight) -> Blob:
    rows, groups = scales_shape(weight)

    def read(start: int, stop: int) -> Tensor:
        return check_scales(weight.name, weight.part("scales", start, stop), weight.format)

    blocks = _streamed(weight, read)
    return Blob(FLOAT16, rows * groups * 2, blocks)


def zero_blob(weight: StoredWeight) -> Blob:
    """Zero points in one run: our rows start at a byte, Core ML's 4-bit values do not."""
    bits = weight.format.bits
    rows, groups = scales_shape(weight)

    def blocks() -> Iterator[NDArray[np.uint8]]:
        zeros = weight.part("zeros", 0, rows)
        yield _bytes(pack(unpack(zeros, bits, groups).reshape(1, -1), bits))

    return Blob({4: UINT4, 8: UINT8}[bits], (rows * groups * bits + 7) // 8, blocks)


def float_blob(weight: StoredWeight) -> Blob:
    """A float32 weight rounded to float16."""
    blocks = _streamed(weight, lambda *span: half(weight.name, weight.rows(*span)))
    return Blob(FLOAT16, 2 * int(np.prod(weight.shape)), blocks)


def _streamed(
    weight: StoredWeight, read: Callable[[int, int], Tensor]
) -> Callable[[], Iterator[NDArray[np.uint8]]]:
    return lambda: (_bytes(read(*span)) for span in row_blocks(weight.shape))


def array_blob(values: NDArray[np.float16]) -> Blob:
    data = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
    return Blob(FLOAT16, data.nbytes, lambda: iter([data]))


def scales_shape(weight: StoredWeight) -> tuple[int, int]:
    """(N, G): a row per output, a scale per group of inputs."""
    rows, width = weight.shape
    return rows, width // weight.format.group


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    data: NDArray[np.uint8] = tensor.contiguous().numpy().view(np.uint8)
    return data.reshape(-1)
