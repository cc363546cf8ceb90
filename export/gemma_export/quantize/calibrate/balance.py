"""Balances the columns of MLP matrices with factors that a neighbouring weight absorbs.

This is activation-aware scaling (AWQ, https://arxiv.org/abs/2306.00978), folded exactly. A factor
of a column of `down_proj` divides the matching row of `up_proj`, whose scales absorb it at no cost.
A factor of a column of `gate_proj` and `up_proj` divides the gain of the norm before them. What
`o_proj` and `down_proj` give goes to a norm of its own or, in Gemma 1, to the residual, which all
layers share: there is no other place to fold factors into. Attention gained nothing.

The columns of a group share one step size. If a column's errors cost a² and its weights have size
s, factors (a / s)^½ would minimize the group's error if all columns contributed to the step (Cauchy
and Schwarz). In fact the largest weight sets the step, and a smaller power works better. Here a² is
the column's cost after GPTQ's compensation.

N rows, K columns.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from gemma_export.quantize.calibrate.gptq import prepare

_SIDE_BY_SIDE = ("gate_proj", "up_proj")
_READERS = {  # of what a matrix or a norm gives; of several, the first
    "input_layernorm": "self_attn.q_proj",
    "pre_feedforward_layernorm": "mlp.gate_proj",
    "up_proj": "down_proj",
}
_POWER = 0.375  # 0.35 to 0.4 give the least error on the 270M
_MOST = 16.0  # factors lie in [1 / _MOST, _MOST]


def balancing_factors(
    index: int, weights: Mapping[str, Tensor], grams: Mapping[str, Tensor], names: Collection[str]
) -> dict[str, Tensor]:
    """Column factors (K,) of a layer's MLP matrices, by name, for groups with one in `names`."""
    mlp = f"model.layers.{index}.mlp"
    by_name: dict[str, Tensor] = {}
    for group in (_SIDE_BY_SIDE, ("down_proj",)):
        members = [f"{mlp}.{part}.weight" for part in group]
        if any(name in names for name in members):
            factors = _factors([weights[name] for name in members], grams[members[0]])
            by_name |= dict.fromkeys(members, factors)
    return by_name


def balanced(name: str, values: Tensor, factors: Mapping[str, Tensor], start: int = 0) -> Tensor:
    """Apply the factors to rows of a layer's weight, from `start`.

    Multiplies its columns by its own factors, and divides its rows, or a norm's gain, by those of
    the matrix that reads them.
    """
    layer, _, part = name.removesuffix(".weight").rpartition(".")
    if name in factors:
        values = values * factors[name]
    reader = factors.get(f"{layer}.{_READERS[part]}.weight") if part in _READERS else None
    if reader is None:
        return values
    divisors = reader[start : start + len(values)]
    return values / divisors[:, None] if values.dim() == 2 else divided_gain(values, divisors)


def divided_gain(gain: Tensor, divisors: Tensor) -> Tensor:
    """The gain of a norm whose outputs are divided: a norm multiplies by 1 + gain."""
    return (1 + gain) / divisors - 1


def _factors(matrices: list[Tensor], gram: Tensor) -> Tensor:
    """(K,) factors of matrices with the same inputs, with geometric mean 1."""
    count = sum(len(matrix) for matrix in matrices)
    size = torch.stack([matrix.square().sum(0) for matrix in matrices]).sum(0) / count
    log = _POWER / 2 * (prepare(gram).cost.log() - size.clamp_(min=1e-20).log())
    return (log - log.mean()).exp_().clamp_(1 / _MOST, _MOST)
