"""Reads the codes back from a GGUF file that `--target gguf` wrote, without llama.cpp.

N rows, K inputs, B blocks of 32 per row. Source: ggml `docs/gguf.md`, `ggml-common.h`.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.errors import BundleError

_F32, _Q4_0, _Q4_1, _Q8_0 = 0, 2, 3, 8
_BLOCK_BYTES = {_Q4_0: 18, _Q4_1: 20, _Q8_0: 34}
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufCodes:
    """A matrix: weight = scale · (code - zero), one scale and zero per 32 inputs."""

    name: str  # llama.cpp's name
    bits: int
    codes: NDArray[np.uint8]  # (N, K)
    scales: NDArray[np.float16]  # (N, B)
    minima: NDArray[np.float16] | None  # (N, B) -scale · zero; None: zero is 2^(bits-1)


def read_gguf_codes(path: Path) -> Iterator[GgufCodes]:
    """Every quantized matrix in turn. Raises BundleError for other types and damaged files."""
    data = np.memmap(path, np.uint8, "r")
    try:
        tensors, start = _read_header(data.data)
    except (struct.error, KeyError, UnicodeDecodeError) as error:
        raise BundleError(
            f"{path} is not a GGUF file written by gemma-export: {error!r}"
        ) from error
    for name, (shape, kind, offset) in tensors.items():
        if kind == _F32:
            continue
        if kind not in _BLOCK_BYTES:
            raise BundleError(f"{path}: {name} has type {kind}, expected Q4_0, Q4_1 or Q8_0")
        rows, blocks = shape[0], shape[1] // 32
        size = rows * blocks * _BLOCK_BYTES[kind]
        raw = data[start + offset : start + offset + size]
        if len(raw) != size:
            raise BundleError(f"{path} ends inside {name}; copy it again")
        yield _unpack(name, kind, raw.reshape(rows, blocks, -1))


def _unpack(name: str, kind: int, blocks: NDArray[np.uint8]) -> GgufCodes:
    scales, rest = _float16(blocks[..., :2]), blocks[..., 2:]
    if kind == _Q8_0:
        return GgufCodes(name, 8, _rows(rest ^ np.uint8(0x80)), scales, None)
    minima = None
    if kind == _Q4_1:
        minima, rest = _float16(rest[..., :2]), rest[..., 2:]
    return GgufCodes(name, 4, _rows(np.concatenate([rest & 15, rest >> 4], -1)), scales, minima)


def _read_header(
    data: memoryview,
) -> tuple[Mapping[str, tuple[tuple[int, ...], int, int]], int]:
    """Tensors by name (shape with rows first, type, offset), and the offset of the data."""
    magic, version, count, pairs = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version != 3:
        raise KeyError(magic)
    place = 24
    for _ in range(pairs):
        _, place = _text(data, place)
        (kind,) = struct.unpack_from("<I", data, place)
        place = _skip(data, place + 4, kind)
    tensors = {}
    for _ in range(count):
        name, place = _text(data, place)
        (dimensions,) = struct.unpack_from("<I", data, place)
        *shape, kind, offset = struct.unpack_from(f"<{dimensions}QIQ", data, place + 4)
        tensors[name] = tuple(reversed(shape)), kind, offset
        place += 16 + 8 * dimensions
    return tensors, place + -place % 32


def _skip(data: memoryview, place: int, kind: int) -> int:
    if kind == _STRING:
        return _text(data, place)[1]
    if kind != _ARRAY:
        return place + _WIDTHS[kind]
    inner, count = struct.unpack_from("<IQ", data, place)
    place += 12
    if inner != _STRING:
        return place + int(_WIDTHS[inner] * count)
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", data, place)
        place += 8 + int(length)
    return place


def _text(data: memoryview, place: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, place)
    return bytes(data[place + 8 : place + 8 + length]).decode(), place + 8 + int(length)


def _float16(raw: NDArray[np.uint8]) -> NDArray[np.float16]:
    return np.ascontiguousarray(raw).view(np.float16)[..., 0]


def _rows(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return codes.reshape(len(codes), -1)
