"""Recovers Q4_0 codes from float weights: unquantized checkpoints of quantization-aware training.

Such a file stores d · q rounded to its dtype, with a float16 d per 32 inputs and q from -8 to 7.
The search finds d and q, and succeeds only if they reproduce every weight bit for bit.
N rows, G groups per row, U unsolved groups.
"""

import torch
from torch import Tensor

from gemma_export.formats.codes import Codes, pack
from gemma_export.formats.format import INT4

# Codes to try for the largest weight: -8 by ggml's rule; others if training chose the scale.
_CODES = (-8, 7, -7, 6, -6, 5, -5, 4, -4, 3, -3, 2, -2, 1, -1, 8)
# float16 steps to try around the quotient, because rounding to bfloat16 loses three bits of it.
_STEPS = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 5}


def grid_codes(values: Tensor, dtype: torch.dtype) -> Codes | None:
    """Codes of (N, K) float32 rows from a `dtype` file; None if any group is not on the grid."""
    if values.shape[1] % INT4.group:
        return None
    groups = values.reshape(-1, INT4.group)  # (N · G, 32)
    distinct = 1 + (groups.sort(-1)[0].diff() != 0).sum(-1)
    if (distinct > 1 << INT4.bits).any():  # rejects nearly every other checkpoint quickly
        return None
    scales = torch.zeros(len(groups), dtype=torch.float16)
    codes = torch.zeros(groups.shape, dtype=torch.int8)
    left = groups.abs().amax(-1).nonzero()[:, 0]  # a group of zeros is on every grid
    for code in _CODES:
        for step in _nearest_first(_STEPS[dtype]):
            if len(left) == 0:
                break
            left = _solve(groups, left, code, step, dtype, scales, codes)
    if len(left):
        return None
    unsigned = (codes + 8).to(torch.uint8).view(len(values), -1)
    return Codes(pack(unsigned, 4), scales.view(len(values), -1), None)


def _solve(
    groups: Tensor,
    left: Tensor,
    code: int,
    step: int,
    dtype: torch.dtype,
    scales: Tensor,
    codes: Tensor,
) -> Tensor:
    """Try one scale on the unsolved groups; store the solved ones, return the rest."""
    part = groups[left]  # (U, 32)
    largest = part.gather(-1, part.abs().argmax(-1, keepdim=True))  # (U, 1)
    bits = (largest / code).half().view(torch.int16) + step
    scale = bits.view(torch.float16).float()
    steps = (part / scale).round_().clamp_(-8, 7)  # NaN if the scale is 0: never equal
    solved = (steps.mul(scale).to(dtype).float() == part).all(-1)
    scales[left[solved]] = scale[solved, 0].half()
    codes[left[solved]] = steps[solved].to(torch.int8)
    return left[~solved]


def _nearest_first(reach: int) -> list[int]:
    return sorted(range(-reach, reach + 1), key=abs)
