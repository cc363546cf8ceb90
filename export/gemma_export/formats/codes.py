"""Packs and unpacks quantized codes. N rows, K inputs, G groups per row.

The layout is that of ONNX Runtime's MatMulNBits: unsigned codes, two per byte at 4 bits, the
earlier code in the low nibble. Containers with signed codes flip the top bit of each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gemma_export.formats.format import Format


class Codes(NamedTuple):
    """Rows of a quantized matrix: weight = scale · (code - zero)."""

    codes: Tensor  # (N, K · bits / 8) uint8
    scales: Tensor  # (N, G) float16
    zeros: Tensor | None  # (N, ceil(G · bits / 8)) uint8; None is 2^(bits-1)

    def parts(self) -> dict[str, Tensor]:
        """The tensors by name; `zeros` only if the format has them."""
        return {name: rows for name, rows in self._asdict().items() if rows is not None}


def join(blocks: Sequence[Codes]) -> Codes:
    """Stack blocks of rows of one matrix."""
    zeros = [block.zeros for block in blocks if block.zeros is not None]
    return Codes(
        torch.cat([block.codes for block in blocks]),
        torch.cat([block.scales for block in blocks]),
        torch.cat(zeros) if zeros else None,
    )


def pack(values: Tensor, bits: int) -> Tensor:
    """(N, K) uint8 codes → (N, ceil(K · bits / 8)) bytes; an odd row is padded with zero."""
    if bits == 8:
        return values
    if values.shape[1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    pairs = values.contiguous().view(torch.int16)  # the first code in the low byte
    return ((pairs & 0xF) | (pairs >> 4)).to(torch.uint8)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `pack`: (N, bytes) → (N, width) uint8."""
    if bits == 8:
        return packed
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)[:, :width]


def signed(packed: Tensor, bits: int, width: int) -> Tensor:
    """Unsigned codes → signed numbers, code - 2^(bits-1): (N, K) int8."""
    return (unpack(packed, bits, width) - (1 << (bits - 1))).to(torch.int8)  # uint8 wraps


def dequantize(block: Codes, fmt: Format) -> Tensor:
    """(N, K) float32 weights, exactly the numbers that every container represents."""
    rows, groups = block.scales.shape
    codes = unpack(block.codes, fmt.bits, groups * fmt.group).view(rows, groups, fmt.group)
    zero: Tensor | float = float(1 << (fmt.bits - 1))
    if block.zeros is not None:
        zero = unpack(block.zeros, fmt.bits, groups).float()[..., None]  # (N, G, 1)
    return ((codes.float() - zero) * block.scales.float()[..., None]).view(rows, -1)
