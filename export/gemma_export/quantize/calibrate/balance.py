"""Columns of a matrix made to need the same fineness, by factors that another weight takes back.

Activation-aware scaling (AWQ, https://arxiv.org/abs/2306.00978), folded exactly: what multiplies a
column of `down_proj` divides a row of `up_proj`, whose scales follow it at no cost; what multiplies
a column of `gate_proj` and `up_proj` divides the gain of the norm before them. Nothing can be
folded behind Gemma's post-norms, nor into the table, which is embedding and head in one; attention
gained nothing by it.

A group of columns has one step. With errors of a column weighted by a², and weights of size s, the
group's error would be least for factors (a / s)^½ if all sizes made the step together, by Cauchy
and Schwarz; since the largest makes it, a smaller power serves better. Here a² is what is left of a
column's power once GPTQ lets all other columns pay for its error.

N rows, K columns.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from gemma_export.quantize.calibrate.gptq import prepare

_SIDE_BY_SIDE = ("gate_proj", "up_proj")
_POWER = 0.375  # the 270M's errors are least for 0.35 to 0.4
_MOST = 16.0  # a factor, and its inverse


def balancing_factors(
    index: int, weights: Mapping[str, Tensor], grams: Mapping[str, Tensor], names: Collection[str]
) -> dict[str, Tensor]:
    """A layer's factors (K,) by the matrix whose columns they multiply, where `names` has it."""
    mlp = f"model.layers.{index}.mlp"
    found: dict[str, Tensor] = {}
    for group in (_SIDE_BY_SIDE, ("down_proj",)):
        members = [f"{mlp}.{part}.weight" for part in group]
        if any(name in names for name in members):
            factors = _factors([weights[name] for name in members], grams[members[0]])
            found |= dict.fromkeys(members, factors)
    return found


def balanced(name: str, values: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
    """A layer's weight, multiplied or divided by the factors that concern it."""
    layer = ".".join(name.split(".")[:3])
    if name in factors:
        values = values * factors[name]
    if name.endswith("up_proj.weight") and (down := f"{layer}.mlp.down_proj.weight") in factors:
        values = values / factors[down][:, None]
    gain = f"{layer}.pre_feedforward_layernorm.weight"
    if name == gain and (gate := f"{layer}.mlp.gate_proj.weight") in factors:
        values = (1 + values) / factors[gate] - 1
    return values


def _factors(matrices: list[Tensor], gram: Tensor) -> Tensor:
    """(K,) of matrices with the same inputs; their geometric mean is 1."""
    count = sum(len(matrix) for matrix in matrices)
    size = torch.stack([matrix.square().sum(0) for matrix in matrices]).sum(0) / count
    log = _POWER / 2 * (prepare(gram).worth.log() - size.clamp_(min=1e-20).log())
    return (log - log.mean()).exp_().clamp_(1 / _MOST, _MOST)
