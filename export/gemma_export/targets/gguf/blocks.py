"""Packs the store's codes as ggml blocks. N rows, K inputs, B blocks of 32 per row.

Q4_0: a float16 scale and 16 bytes, elements 0 … 15 in the low nibbles, 16 … 31 in the high ones;
weight = scale · (code - 8). Q4_1: a float16 minimum after the scale; weight = scale · code +
minimum. Q8_0: a float16 scale and 32 signed bytes.
Source: ggml `ggml-common.h` and `ggml-quants.c`, `dequantize_row_q4_0` and its siblings.
"""

import torch
from torch import Tensor

from gemma_export.formats.codes import Codes, unpack
from gemma_export.formats.format import Format
from gemma_export.targets.gguf.block_types import BLOCK
from gemma_runtime.errors import TargetError


def pack_blocks(name: str, rows: Codes, fmt: Format) -> Tensor:
    """Rows as ggml blocks: (N, bytes per row) uint8.

    Raises TargetError if float16 can't hold a minimum exactly.
    """
    count, groups = rows.scales.shape
    repeat = fmt.group // BLOCK
    scales = rows.scales.repeat_interleave(repeat, dim=1)[..., None]  # (N, B, 1)
    codes = unpack(rows.codes, fmt.bits, groups * fmt.group).view(count, -1, BLOCK)  # (N, B, 32)
    parts = [scales.contiguous().view(torch.uint8)]  # (N, B, 2)
    if fmt.bits == 8:
        parts.append(codes ^ 0x80)  # code - 128 as a signed byte
        return torch.cat(parts, dim=-1).flatten(1)
    if rows.zeros is not None:
        zeros = unpack(rows.zeros, fmt.bits, groups)
        minimum = _minimum(name, rows.scales, zeros).repeat_interleave(repeat, dim=1)[..., None]
        parts.append(minimum.contiguous().view(torch.uint8))
    low, high = codes[..., : BLOCK // 2], codes[..., BLOCK // 2 :]
    return torch.cat([*parts, low | (high << 4)], dim=-1).flatten(1)


def _minimum(name: str, scales: Tensor, zeros: Tensor) -> Tensor:
    """-scale · zero: (N, G) float16."""
    exact = -scales.float() * zeros.float()
    minimum = exact.half()
    if not torch.equal(minimum.float(), exact):
        raise TargetError(
            f"gguf can't store {name} exactly: Q4_1 stores -scale · zero, which float16 "
            "can't represent; choose a symmetric recipe, e.g. --quant int4"
        )
    return minimum
