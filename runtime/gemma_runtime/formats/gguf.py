"""Reads the header of a GGUF file, and checks every number in it before it is used.

The format: a counted list of typed key-value pairs, a counted list of tensor infos, padding, the
tensors (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The gguf package's reader maps
the whole file and trusts the header; the runtime works without that package.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

Value = int | float | str | list[str] | NDArray[np.generic]

MAX_HEADER = 32 << 20  # bytes; Gemma 4's vocabulary makes it 16 MB
_LONGEST_NAME = 256


class GgufType(IntEnum):
    """The types of tensors that are read, by ggml's names and numbers."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39


BLOCKS: Mapping[int, tuple[int, int]] = {  # elements and bytes of a block
    GgufType.F32: (1, 4),
    GgufType.F16: (1, 2),
    GgufType.Q4_0: (32, 18),
    GgufType.Q4_1: (32, 20),
    GgufType.Q5_0: (32, 22),
    GgufType.Q5_1: (32, 24),
    GgufType.Q8_0: (32, 34),
    GgufType.Q2_K: (256, 84),
    GgufType.Q3_K: (256, 110),
    GgufType.Q4_K: (256, 144),
    GgufType.Q5_K: (256, 176),
    GgufType.Q6_K: (256, 210),
    GgufType.IQ2_XXS: (256, 66),
    GgufType.IQ2_XS: (256, 74),
    GgufType.IQ3_XXS: (256, 98),
    GgufType.IQ1_S: (256, 50),
    GgufType.IQ4_NL: (32, 18),
    GgufType.IQ3_S: (256, 110),
    GgufType.IQ2_S: (256, 82),
    GgufType.IQ4_XS: (256, 136),
    GgufType.IQ1_M: (256, 56),
    GgufType.BF16: (1, 2),
    GgufType.TQ1_0: (256, 54),
    GgufType.TQ2_0: (256, 66),
    GgufType.MXFP4: (32, 17),
}
OTHER_TYPES: Mapping[int, str] = {  # which are refused by name
    9: "Q8_1",
    15: "Q8_K",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    40: "NVFP4",  # its tensors have a second scale beside them
}
STRING, ARRAY, _FLOAT32 = 8, 9, 6
NUMBERS: Mapping[int, str] = {  # numpy's types, by GGUF's
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    _FLOAT32: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    type: GgufType
    shape: tuple[int, ...]  # rows first; GGUF stores the reverse
    offset: int = 0  # from the start of the file

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; of one element if the tensor has one dimension."""
        block, block_bytes = BLOCKS[self.type]
        return math.prod(self.shape[1:]) // block * block_bytes

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.row_bytes


@dataclass(frozen=True, slots=True)
class GgufHeader:
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header, and check that the tensors fill the file and have supported types.

    Raises ValueError with a line about the file, or OSError. Reads at most MAX_HEADER bytes,
    whatever the file claims.
    """
    with path.open("rb") as file:
        return _header(_Cursor(file, path.stat().st_size))


class _Cursor:
    """Reads forward through the header; never past the file's end or MAX_HEADER."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.size = size
        self._file = file
        self._limit = min(size, MAX_HEADER)
        self.position = 0

    def take(self, count: int) -> bytes:
        if count > self._limit - self.position:
            raise ValueError(
                f"the header runs past byte {self._limit}; the file is cut off or damaged, "
                "copy or download it again"
            )
        self.position += count
        return self._file.read(count)

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def text(self) -> str:
        try:
            return self.take(self.number(8)).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"the string before byte {self.position} is not UTF-8") from error

    def name(self) -> str:
        """A string that is short and printable, so that errors can show it."""
        name = self.text()
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise ValueError(f"the name before byte {self.position} is damaged")
        return name


def _header(cursor: _Cursor) -> GgufHeader:
    if (magic := cursor.take(min(4, cursor.size))) != b"GGUF":
        raise ValueError(f"starts with {magic!r}, expected b'GGUF'; this is not a GGUF file")
    if (version := cursor.number(4)) not in (2, 3):
        raise ValueError(f"is GGUF version {version}, expected 2 or 3, little-endian")
    tensor_count, pair_count = cursor.number(8), cursor.number(8)
    metadata: dict[str, Value] = {}
    for _ in range(pair_count):
        key = cursor.name()
        if key in metadata:
            raise ValueError(f"has {key} twice; the file is damaged")
        metadata[key] = _value(cursor, key)
    return GgufHeader(metadata, _tensors(cursor, tensor_count, _alignment(metadata)))


def _value(cursor: _Cursor, key: str) -> Value:
    kind = cursor.number(4)
    if kind == STRING:
        return cursor.text()
    if kind == ARRAY:
        return _array(cursor, key)
    number = np.frombuffer(cursor.take(_number_type(key, kind).itemsize), NUMBERS[kind])[0]
    # 1e-06 as in config.json, not 9.999999974752427e-07.
    return float(str(number)) if kind == _FLOAT32 else number.item()


def _array(cursor: _Cursor, key: str) -> Value:
    kind, count = cursor.number(4), cursor.number(8)
    if kind == STRING:
        return [cursor.text() for _ in range(count)]
    dtype = _number_type(key, kind)
    return np.frombuffer(cursor.take(count * dtype.itemsize), dtype)


def _number_type(key: str, kind: int) -> np.dtype[np.generic]:
    if kind not in NUMBERS:
        raise ValueError(f"{key} has the unknown value type {kind}; the file is damaged")
    return np.dtype(NUMBERS[kind])


def _alignment(metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16 or alignment % 8:
        raise ValueError(f"general.alignment is {alignment!r:.40}, expected a multiple of 8")
    return alignment


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    """Read the tensor infos, and check that each tensor begins at the padded end of the last."""
    found: dict[str, tuple[GgufTensor, int]] = {}
    for _ in range(count):
        name = cursor.name()
        if name in found:
            raise ValueError(f"has tensor {name} twice; the file is damaged")
        found[name] = _tensor(cursor, name), cursor.number(8)
    end = start = cursor.position + -cursor.position % alignment
    tensors: dict[str, GgufTensor] = {}
    for name, (tensor, offset) in found.items():
        if start + offset != end:
            raise ValueError(f"tensor {name} begins at byte {start + offset}, expected {end}")
        tensors[name] = GgufTensor(tensor.type, tensor.shape, end)
        if end + tensor.bytes > cursor.size:
            raise ValueError(
                f"tensor {name} ends at byte {end + tensor.bytes}, the file at {cursor.size}; "
                "the file is cut off, copy or download it again"
            )
        end += tensor.bytes + -tensor.bytes % alignment
    return tensors


def _tensor(cursor: _Cursor, name: str) -> GgufTensor:
    dimensions = cursor.number(4)
    if not 1 <= dimensions <= 4:
        raise ValueError(f"tensor {name} has {dimensions} dimensions, expected 1 to 4")
    shape = tuple(cursor.number(8) for _ in range(dimensions))[::-1]
    kind = cursor.number(4)
    if kind not in BLOCKS:
        raise ValueError(
            f"tensor {name} is {OTHER_TYPES.get(kind, f'type {kind}')}, which can't be read; "
            f"expected one of {', '.join(supported.name for supported in GgufType)}"
        )
    tensor = GgufTensor(GgufType(kind), shape)
    block, _ = BLOCKS[tensor.type]
    if min(shape) < 1 or math.prod(shape[1:]) % block or (shape[1:] and shape[-1] % block):
        raise ValueError(f"tensor {name} of shape {shape} can't be {tensor.type.name}")
    return tensor
