"""The layout of a `.pte` file: where its constants and its named data lie.

Field numbers are those of ExecuTorch's program.fbs; the header before the flatbuffer is its
extended header, `eh00`.
"""

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flatbuffers.encode import Get, Write
from flatbuffers.number_types import Uint32Flags, Uint64Flags
from flatbuffers.table import Table

from gemma_runtime.errors import TargetError

_HEADER_AT, _LENGTH_AT, _MAGIC = 8, 32, b"eh00"
_SEGMENTS, _CONSTANTS, _NAMED_DATA = 4, 5, 7  # fields of Program
_COPY = 8 << 20  # bytes at a time


@dataclass(frozen=True, slots=True)
class _Segment:
    table: Table  # DataSegment, in the file's bytes
    start: int  # in the file
    size: int


class PteFile:
    """A `.pte` mapped into memory."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        magic, _, _, self._base = struct.unpack_from("<4sIQQ", data, _HEADER_AT)
        if magic != _MAGIC or not self._base:
            raise TargetError("not a .pte file with segments; export it again")
        self._program = Table(data, Get(Uint32Flags.packer_type, data, 0))

    def named_data(self, key: str) -> memoryview:
        segment = self._named(key)
        return memoryview(self._data)[segment.start : segment.start + segment.size]

    def share(self, key: str) -> tuple[int, int]:
        """Point named data at the constant of the same bytes; returns the span that is free now.

        The segments behind it are moved forwards, to where they lie once the span is cut out.
        """
        named = self._named(key)
        content = self.named_data(key)
        constant = next((at for at in self._constants() if self._same(at, content)), None)
        content.release()
        if constant is None:
            raise TargetError(f"no constant of the .pte has the bytes of {key}")
        behind = [s for s in self._segments() if s.start > named.start]
        stop = min((s.start for s in behind), default=len(self._data))
        gap = stop - named.start
        for segment in behind:
            self._set_offset(segment, segment.start - self._base - gap)
        self._set_offset(named, constant - self._base)
        struct.pack_into("<Q", self._data, _LENGTH_AT, len(self._data) - self._base - gap)
        return named.start, stop

    def _set_offset(self, segment: _Segment, offset: int) -> None:
        at = segment.table.Pos + segment.table.Offset(_slot(0))
        Write(Uint64Flags.packer_type, self._data, at, offset)

    def _same(self, at: int, content: memoryview) -> bool:
        return (
            self._data[at : at + 64] == content[:64]
            and memoryview(self._data)[at : at + len(content)] == content
        )

    def _constants(self) -> Iterator[int]:
        field = self._program.Offset(_slot(_CONSTANTS))
        table = Table(self._data, self._program.Indirect(self._program.Pos + field))
        segment = self._segments()[_number(table, 0, Uint32Flags)]
        offsets = table.Offset(_slot(1))
        first = table.Vector(offsets)
        for place in range(1, table.VectorLen(offsets)):  # 0 is reserved
            yield segment.start + Get(Uint64Flags.packer_type, self._data, first + 8 * place)

    def _named(self, key: str) -> _Segment:
        for table in self._vector(_NAMED_DATA):
            name = table.String(table.Pos + table.Offset(_slot(0))).decode()
            if name == key:
                return self._segments()[_number(table, 1, Uint32Flags)]
        raise TargetError(f"the .pte has no named data {key!r}")

    def _segments(self) -> list[_Segment]:
        return [
            _Segment(
                table,
                self._base + _number(table, 0, Uint64Flags),
                _number(table, 1, Uint64Flags),
            )
            for table in self._vector(_SEGMENTS)
        ]

    def _vector(self, field: int) -> Iterator[Table]:
        offset = self._program.Offset(_slot(field))
        if not offset:
            return
        first = self._program.Vector(offset)
        for place in range(self._program.VectorLen(offset)):
            yield Table(self._data, self._program.Indirect(first + 4 * place))


@contextmanager
def open_pte(path: Path, writable: bool = False) -> Iterator[PteFile]:
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    mode = "r+b" if writable else "rb"
    with path.open(mode) as file, mmap.mmap(file.fileno(), 0, access=access) as data:
        yield PteFile(data)


def share_constant(path: Path, key: str) -> None:
    """Store once what a program holds as a constant and as named data, and shorten the file."""
    with open_pte(path, writable=True) as pte:
        start, stop = pte.share(key)
    _cut(path, start, stop)


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


def _slot(field: int) -> int:
    """A field's place in its table's vtable."""
    return 4 + 2 * field


def _number(table: Table, field: int, kind: type[Uint32Flags] | type[Uint64Flags]) -> int:
    offset = table.Offset(_slot(field))
    return int(table.Get(kind, table.Pos + offset)) if offset else 0
