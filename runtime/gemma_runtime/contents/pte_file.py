"""Finds constants and named data in a `.pte` file.

Field numbers are those of ExecuTorch's program.fbs; the header before the flatbuffer is its
extended header, `eh00`.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flatbuffers.encode import Get
from flatbuffers.number_types import Uint8Flags, Uint32Flags, Uint64Flags
from flatbuffers.table import Table

from gemma_runtime.errors import BundleError

_HEADER_AT, _MAGIC = 8, b"eh00"
_PLANS, _SEGMENTS, _CONSTANTS, _NAMED_DATA = 1, 4, 5, 7  # fields of Program
_VALUES = 2  # a field of ExecutionPlan
_MOST_TABLES = 1 << 20  # read in all; a file of Gemma 2 27b has some ten thousand
_IS_TENSOR = 5  # in the union KernelTypes
_SIZES, _BUFFER = 2, 5  # fields of Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    start: int  # offset in the file
    size: int
    size_at: int  # where the file holds the size, a uint64


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor with bytes in the segment of constants."""

    shape: tuple[int, ...]
    start: int  # offset of its bytes in the file
    shape_at: int  # where the file holds the shape, as int32
    offset_at: int  # where it holds the bytes' offset in the segment, a uint64


class PteFile:
    """A `.pte` mapped into memory. All methods raise BundleError if it is damaged."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self._visited = 0  # tables
        with _damage_named():
            magic, _, _, self.base = struct.unpack_from("<4sIQQ", data, _HEADER_AT)
            if magic != _MAGIC or not self.base:
                raise BundleError("not a .pte file with segments; export the bundle again")
            self._program = Table(data, Get(Uint32Flags.packer_type, data, 0))

    def named_data(self, key: str) -> memoryview:
        segment = self.named(key)
        return memoryview(self.data)[segment.start : segment.start + segment.size]

    @property
    def constant_segment(self) -> Segment:
        with _damage_named():
            return self.segments()[_number(self._constant_offsets(), 0, Uint32Flags)]

    def constants(self) -> Iterator[Constant]:
        """The constants of all methods; one for each tensor that uses it."""
        with _damage_named():
            yield from self._constants()

    def _constants(self) -> Iterator[Constant]:
        start, offsets = self.constant_segment.start, self._constant_offsets()
        first = offsets.Vector(offsets.Offset(slot(1)))
        for plan in self._vector(self._program, _PLANS):
            for value in self._vector(plan, _VALUES):
                if _number(value, 0, Uint8Flags) != _IS_TENSOR:
                    continue
                tensor = Table(self.data, value.Indirect(value.Pos + value.Offset(slot(1))))
                if not (buffer := _number(tensor, _BUFFER, Uint32Flags)):
                    continue
                offset_at = first + 8 * buffer
                offset = Get(Uint64Flags.packer_type, self.data, offset_at)
                shape_at = tensor.Vector(tensor.Offset(slot(_SIZES)))
                rank = tensor.VectorLen(tensor.Offset(slot(_SIZES)))
                shape = struct.unpack_from(f"<{rank}i", self.data, shape_at)
                yield Constant(shape, start + offset, shape_at, offset_at)

    def _constant_offsets(self) -> Table:
        at = self._program.Pos + self._program.Offset(slot(_CONSTANTS))
        return Table(self.data, self._program.Indirect(at))

    def named(self, key: str) -> Segment:
        with _damage_named():
            for table in self._vector(self._program, _NAMED_DATA):
                name = table.String(table.Pos + table.Offset(slot(0)))
                if name == key.encode():
                    return self.segments()[_number(table, 1, Uint32Flags)]
        raise BundleError(f"the .pte has no named data {key!r}")

    def segments(self) -> list[Segment]:
        with _damage_named():
            return [
                Segment(
                    self.base + _number(table, 0, Uint64Flags),
                    _number(table, 1, Uint64Flags),
                    table.Pos + table.Offset(slot(1)),
                )
                for table in self._vector(self._program, _SEGMENTS)
            ]

    def _vector(self, table: Table, field: int) -> Iterator[Table]:
        offset = table.Offset(slot(field))
        if not offset:
            return
        first = table.Vector(offset)
        for place in range(table.VectorLen(offset)):
            self._visited += 1
            if self._visited > _MOST_TABLES:
                raise IndexError(f"more than {_MOST_TABLES} tables")
            yield Table(self.data, table.Indirect(first + 4 * place))


@contextmanager
def open_pte(path: Path, writable: bool = False) -> Iterator[PteFile]:
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    mode = "r+b" if writable else "rb"
    with path.open(mode) as file:
        if not file.seek(0, os.SEEK_END):
            raise BundleError(f"{path} is empty; copy or export the bundle again")
        with mmap.mmap(file.fileno(), 0, access=access) as data:
            yield PteFile(data)


@contextmanager
def _damage_named() -> Iterator[None]:
    """Turn what flatbuffers raises for offsets out of the file into a BundleError."""
    try:
        yield
    except (IndexError, TypeError, struct.error) as error:
        raise BundleError(f"the .pte is damaged ({error}); copy or export it again") from error


def slot(field: int) -> int:
    """Offset of a field in its table's vtable."""
    return 4 + 2 * field


def _number(
    table: Table, field: int, kind: type[Uint8Flags] | type[Uint32Flags] | type[Uint64Flags]
) -> int:
    offset = table.Offset(slot(field))
    return int(table.Get(kind, table.Pos + offset)) if offset else 0
