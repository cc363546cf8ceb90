"""Reads float8 matrices with scales per tensor, row or block. They are always dequantized."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from gemma_export.checkpoint.packed import FLOATS, Holder, Parts
from gemma_export.checkpoint.prequantized import Stored
from gemma_export.formats.codes import Codes

FLOAT8 = ("F8_E4M3", "F8_E5M2")
FLOAT8_NOTE = (
    "float8 weights are dequantized, because float8 is not one of our formats; every recipe "
    "except none rounds them again"
)


@dataclass(frozen=True)
class Float8Matrix:
    """weight = float8 · the scale of its block."""

    shape: tuple[int, ...]
    parts: Parts
    scale: str  # the part's name
    scale_shape: tuple[int, int]
    block: tuple[int, int]

    def rows(self, start: int, stop: int) -> Tensor:
        values = self.parts.read("weight", start, stop).float()
        scales = self.parts.read(self.scale).float().reshape(self.scale_shape)
        row_of = torch.arange(start, stop) // self.block[0]
        return values * scales[row_of][:, torch.arange(self.shape[1]) // self.block[1]]

    def stored(self) -> Stored:
        return Stored(f"fp8 ({self.parts.dtype('weight')})")

    def codes(self, start: int, stop: int) -> Codes:
        raise AssertionError(self.parts.module)


def fp8_matrix(parts: Parts, config: Mapping[str, Any], holder: Holder) -> Float8Matrix:
    """`weight` (N, K), and `weight_scale` or `weight_scale_inv`: both are multiplied."""
    rows, inputs = parts.shape("weight", FLOAT8, 2)
    scale = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    stored = parts.shape(scale, FLOATS)
    count = prod(stored)
    shape = (1, 1) if count == 1 else (stored[0], prod(stored[1:]))
    block = _block(rows, shape[0], config, 0), _block(inputs, shape[1], config, 1)
    if len(stored) > 2 or 0 in block:
        raise parts.error(scale, f"one scale per tensor, row or block of {(rows, inputs)}")
    return Float8Matrix((rows, inputs), parts, scale, shape, block)


def _block(size: int, count: int, config: Mapping[str, Any], axis: int) -> int:
    """The block's length along an axis; 0 if `count` blocks don't fit. The last may be shorter."""
    sizes = config.get("weight_block_size")
    length = sizes[axis] if isinstance(sizes, list) and len(sizes) == 2 else None
    if isinstance(length, int) and length > 0 and -(-size // length) == count:
        return min(length, size)
    return 0 if size % count else size // count
