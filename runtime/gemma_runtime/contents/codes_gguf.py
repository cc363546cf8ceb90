"""Reads the codes back from a GGUF file that `--target gguf` wrote, without llama.cpp.

N rows, K inputs, B blocks of 32 per row. Source: ggml `docs/gguf.md`, `ggml-common.h`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.errors import BundleError
from gemma_runtime.formats.gguf import GgufType, read_gguf_header

_CODES = (GgufType.Q4_0, GgufType.Q4_1, GgufType.Q8_0)


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
    try:
        tensors = read_gguf_header(path).tensors
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: {error}") from error
    for name, tensor in tensors.items():
        if tensor.type is GgufType.F32:
            continue
        if tensor.type not in _CODES:
            raise BundleError(
                f"{path}: {name} is {tensor.type.name}, expected Q4_0, Q4_1 or Q8_0; export again"
            )
        rows, width = tensor.shape
        raw = data[tensor.offset : tensor.offset + tensor.bytes]
        yield _unpack(name, tensor.type, raw.reshape(rows, width // 32, -1))


def _unpack(name: str, kind: GgufType, blocks: NDArray[np.uint8]) -> GgufCodes:
    scales, rest = _float16(blocks[..., :2]), blocks[..., 2:]
    if kind is GgufType.Q8_0:
        return GgufCodes(name, 8, _rows(rest ^ np.uint8(0x80)), scales, None)
    minima = None
    if kind is GgufType.Q4_1:
        minima, rest = _float16(rest[..., :2]), rest[..., 2:]
    return GgufCodes(name, 4, _rows(np.concatenate([rest & 15, rest >> 4], -1)), scales, minima)


def _float16(raw: NDArray[np.uint8]) -> NDArray[np.float16]:
    return np.ascontiguousarray(raw).view(np.float16)[..., 0]


def _rows(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return codes.reshape(len(codes), -1)
