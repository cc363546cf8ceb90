"""Finds constants and named data in a `.pte` file.

Field numbers are those of ExecuTorch's program.fbs; the header before the flatbuffer is its
extended header, `eh00`.
"""

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flatbuffers.encode import Get
from flatbuffers.number_types import Uint32Flags, Uint64Flags
from flatbuffers.table import Table

from gemma_runtime.errors import BundleError

_HEADER_AT, _MAGIC = 8, b"eh00"
_SEGMENTS, _CONSTANTS, _NAMED_DATA = 4, 5, 7  # fields of Program


@dataclass(frozen=True, slots=True)
class Segment:
    table: Table  # the DataSegment in the file's bytes
    start: int  # offset in the file
    size: int


class PteFile:
    """A `.pte` mapped into memory."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        magic, _, _, self.base = struct.unpack_from("<4sIQQ", data, _HEADER_AT)
        if magic != _MAGIC or not self.base:
            raise BundleError("not a .pte file with segments; export the bundle again")
        self._program = Table(data, Get(Uint32Flags.packer_type, data, 0))

    def named_data(self, key: str) -> memoryview:
        segment = self.named(key)
        return memoryview(self.data)[segment.start : segment.start + segment.size]

    def constants(self) -> Iterator[int]:
        field = self._program.Offset(slot(_CONSTANTS))
        table = Table(self.data, self._program.Indirect(self._program.Pos + field))
        segment = self.segments()[_number(table, 0, Uint32Flags)]
        offsets = table.Offset(slot(1))
        first = table.Vector(offsets)
        for place in range(1, table.VectorLen(offsets)):  # 0 is reserved
            yield segment.start + Get(Uint64Flags.packer_type, self.data, first + 8 * place)

    def named(self, key: str) -> Segment:
        for table in self._vector(_NAMED_DATA):
            name = table.String(table.Pos + table.Offset(slot(0))).decode()
            if name == key:
                return self.segments()[_number(table, 1, Uint32Flags)]
        raise BundleError(f"the .pte has no named data {key!r}")

    def segments(self) -> list[Segment]:
        return [
            Segment(
                table,
                self.base + _number(table, 0, Uint64Flags),
                _number(table, 1, Uint64Flags),
            )
            for table in self._vector(_SEGMENTS)
        ]

    def _vector(self, field: int) -> Iterator[Table]:
        offset = self._program.Offset(slot(field))
        if not offset:
            return
        first = self._program.Vector(offset)
        for place in range(self._program.VectorLen(offset)):
            yield Table(self.data, self._program.Indirect(first + 4 * place))


@contextmanager
def open_pte(path: Path, writable: bool = False) -> Iterator[PteFile]:
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    mode = "r+b" if writable else "rb"
    with path.open(mode) as file, mmap.mmap(file.fileno(), 0, access=access) as data:
        yield PteFile(data)


def slot(field: int) -> int:
    """Offset of a field in its table's vtable."""
    return 4 + 2 * field


def _number(table: Table, field: int, kind: type[Uint32Flags] | type[Uint64Flags]) -> int:
    offset = table.Offset(slot(field))
    return int(table.Get(kind, table.Pos + offset)) if offset else 0
