"""GPTQ: columns are rounded one after another, each paying for the errors of those before it.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323, with two additions. Scales are chosen before
anything is rounded, on the grid that all containers share, by a search whose errors are weighted
with the inputs' power. Columns are rounded most powerful first (`desc_act`), while groups stay
where they lie ("static groups"), so codes are stored in the original order.

N rows, K inputs, G groups per row, g inputs per group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_export.quantize.pack import Codes, join, pack
from gemma_export.quantize.recipe import Format
from gemma_export.quantize.round import search

_DAMPING = 0.01  # of the mean power, added to the diagonal: keeps the factor finite
_BLOCK = 64  # columns whose errors are passed on together
_WIDE = 4096  # inputs beyond which the factor is computed in float32
_SLICE = 8192  # rows at a time
# Shares of the full range that a scale may cover.
_SHRINKS = tuple(1 - 0.04 * step for step in range(1, 13))


@dataclass(frozen=True, slots=True)
class Inputs:
    """What GPTQ knows of a matrix's inputs; found once, for all blocks of rows."""

    power: Tensor  # (K,)
    order: Tensor  # (K,) columns, most powerful first
    factor: Tensor  # (K, K), see `inverse_factor`


def prepare(gram: Tensor, damping: float = _DAMPING) -> Inputs:
    """From Σ x xᵀ (K, K)."""
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    return Inputs(gram.diagonal(), order, inverse_factor(gram, order, damping))


def gptq(rows: Tensor, inputs: Inputs, form: Format) -> Codes:
    """Round (N, K) float32 rows for the given inputs."""
    starts = range(0, len(rows), _SLICE)
    return join([_round_slice(rows[i : i + _SLICE], inputs, form) for i in starts])


def inverse_factor(gram: Tensor, order: Tensor, damping: float) -> Tensor:
    """Upper U with Uᵀ U = (gram + damping)⁻¹ in the given order of columns: (K, K) float32.

    In float64 as long as that is no matter of memory.
    """
    square = gram[order][:, order].to(torch.float64 if len(gram) <= _WIDE else torch.float32)
    square.diagonal().add_(damping * square.diagonal().mean().clamp(min=1e-12))
    torch.linalg.cholesky(square, out=square)
    torch.cholesky_inverse(square, out=square)
    torch.linalg.cholesky(square, upper=True, out=square)
    return square.float()


def weighted_scales(groups: Tensor, power: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """(N, G, g) and input power (G, g) → scale and zero (N, G) of the least weighted error."""

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        steps = (groups / scale[..., None]).round_().add_(zero[..., None])
        steps.clamp_(0, (1 << form.bits) - 1).sub_(zero[..., None])
        return ((steps * scale[..., None] - groups).square_() * power).sum(-1)

    return search(groups, form, _SHRINKS, error)


def _round_slice(rows: Tensor, inputs: Inputs, form: Format) -> Codes:
    count, width = rows.shape
    groups = rows.view(count, -1, form.group)  # (N, G, g)
    scale, zero = weighted_scales(groups, inputs.power.view(-1, form.group), form)
    order, group_of = inputs.order, inputs.order // form.group
    codes = torch.empty(width, count, dtype=torch.uint8)
    codes[order] = _round_columns(
        rows.T[order], scale.T[group_of], zero.T[group_of], inputs.factor, (1 << form.bits) - 1
    )
    packed = pack(codes.T.contiguous(), form.bits)
    zeros = pack(zero.to(torch.uint8), form.bits) if form.asymmetric else None
    return Codes(packed, scale.half(), zeros)


def _round_columns(
    columns: Tensor, scale: Tensor, zero: Tensor, factor: Tensor, top: int
) -> Tensor:
    """Columns (K, N), already in order, with their scales and zeros → codes (K, N) uint8."""
    width, _ = columns.shape
    codes = torch.empty(columns.shape, dtype=torch.uint8)
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        errors = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            code = (columns[i] / scale[i]).round_().add_(zero[i]).clamp_(0, top)
            codes[i] = code.to(torch.uint8)
            error = (columns[i] - (code - zero[i]) * scale[i]) / factor[i, i]
            columns[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes
