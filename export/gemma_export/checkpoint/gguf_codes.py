"""Converts ggml blocks to our codes without changing any code. N rows, B blocks per row.

Scales keep their sign. Q4_0's scale is negative if a group's largest weight is positive. That
weight has the code -8; there is no code +8, so a positive scale couldn't represent the group.
Source: `dequantize_row_q4_0` and similar functions in ggml's `ggml-quants.c`.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma_export.checkpoint.prequantized import Stored
from gemma_export.formats.codes import Codes, pack
from gemma_export.formats.format import Format
from gemma_runtime.formats.gguf import BLOCKS, GgufType

Blocks = NDArray[np.uint8]  # (N, B, bytes of a block)
STORED: Mapping[GgufType, Stored] = {
    GgufType.Q4_0: Stored("Q4_0", Format(4)),
    GgufType.Q8_0: Stored("Q8_0", Format(8)),
    GgufType.Q5_0: Stored("Q5_0", Format(8)),
    # Its scales are a float16 times an int8, which needs 18 bits.
    GgufType.Q6_K: Stored("Q6_K", Format(8, 16), "scales rounded to float16"),
}


def blocks_to_codes(data: NDArray[np.uint8], kind: GgufType) -> Codes:
    """Convert rows of blocks, (N, bytes), of a type in STORED."""
    blocks = data.reshape(len(data), -1, BLOCKS[kind][1])
    fmt = STORED[kind].format
    assert fmt is not None
    codes, scales = _READERS[kind](blocks)
    packed = pack(torch.from_numpy(np.ascontiguousarray(codes.reshape(len(data), -1))), fmt.bits)
    return Codes(packed, _tensor(scales), None)


def _q4_0(blocks: Blocks) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    return _nibbles(blocks[..., 2:]), _float16(blocks[..., :2])


def _q8_0(blocks: Blocks) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    return blocks[..., 2:] ^ np.uint8(0x80), _float16(blocks[..., :2])


def _q5_0(blocks: Blocks) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """The fifth bits of all 32 elements are in four bytes before the nibbles."""
    fifth = np.unpackbits(blocks[..., 2:6], axis=-1, bitorder="little")  # (N, B, 32)
    codes = _nibbles(blocks[..., 6:]) | (fifth << 4)
    return (codes + np.uint8(128 - 16)).astype(np.uint8), _float16(blocks[..., :2])


def _q6_k(blocks: Blocks) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """256 elements in 16 groups: 128 bytes of low nibbles, 64 of high bit pairs, 16 scales."""
    rows, count = blocks.shape[:2]
    low, high = blocks[..., :128], blocks[..., 128:192]
    low = low.reshape(rows, count, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(2, 1)
    high = high.reshape(rows, count, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    codes = (low & 15).reshape(rows, count, 256) | ((high & 3) << 4).reshape(rows, count, 256)
    steps = blocks[..., 192:208].view(np.int8).astype(np.float32)  # (N, B, 16)
    scales = steps * _float16(blocks[..., 208:])[..., None].astype(np.float32)
    return (codes + np.uint8(128 - 32)).astype(np.uint8), scales.astype(np.float16).reshape(
        rows, -1
    )


_READERS: Mapping[GgufType, Callable[[Blocks], tuple[NDArray[np.uint8], NDArray[np.float16]]]] = {
    GgufType.Q4_0: _q4_0,
    GgufType.Q8_0: _q8_0,
    GgufType.Q5_0: _q5_0,
    GgufType.Q6_K: _q6_k,
}


def _nibbles(data: Blocks) -> NDArray[np.uint8]:
    """Elements 0 … 15 from the low nibbles, 16 … 31 from the high ones."""
    return np.concatenate([data & 15, data >> 4], axis=-1)


def _float16(data: Blocks) -> NDArray[np.float16]:
    """(N, B, 2) bytes → (N, B)."""
    return np.ascontiguousarray(data).view(np.float16)[..., 0]


def _tensor(scales: NDArray[np.float16]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(scales))
