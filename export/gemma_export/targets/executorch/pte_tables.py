"""Tables of which the program looks up rows: constants whose bytes are named data.

torch.export and the writer hold constants in memory, several times. A table is gigabytes, and it
lies in the file already, as the delegates' named data. So the program is written with one row in
place of each table, which is afterwards turned into the whole.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemma_runtime.contents.pte_file import Constant, PteFile, open_pte


@dataclass(frozen=True, slots=True)
class StandIn:
    """A row in place of `rows` of them, which are the named data `key`."""

    key: str
    rows: int
    row: Tensor  # (1, …), unlike any other constant


def stand_in(key: str, rows: int, width: int, dtype: torch.dtype) -> StandIn:
    content = hashlib.shake_256(key.encode()).digest(width * dtype.itemsize)
    return StandIn(key, rows, torch.frombuffer(bytearray(content), dtype=dtype)[None])


def fill_in(path: Path, stand_ins: Sequence[StandIn]) -> None:
    """Turn each row into the table: its constant gets the bytes and the length of the named data.

    The segment of constants grows over the named data, which lies behind it.
    """
    with open_pte(path, writable=True) as pte:
        for one in stand_ins:
            _fill_in(pte, one)


def _fill_in(pte: PteFile, one: StandIn) -> None:
    constant, (named, base) = _find(pte, one.row), (pte.named(one.key), pte.constant_segment)
    offset = named.start - base.start
    assert offset > 0, "named data lies before the constants"
    struct.pack_into("<Q", pte.data, constant.offset_at, offset)
    struct.pack_into("<i", pte.data, constant.shape_at, one.rows)
    if offset + named.size > base.size:
        struct.pack_into("<Q", pte.data, base.size_at, offset + named.size)


def _find(pte: PteFile, row: Tensor) -> Constant:
    content, shape = row.view(torch.uint8).numpy().tobytes(), tuple(row.shape)
    for constant in pte.constants():
        end = constant.start + len(content)
        if constant.shape == shape and pte.data[constant.start : end] == content:
            return constant
    raise AssertionError(f"the program has no constant {shape} in place of a table")
