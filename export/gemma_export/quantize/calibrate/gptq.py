"""GPTQ: rounds column after column; later columns compensate the errors of earlier ones.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323, with two additions. Scales are chosen before
rounding, from the values that every container can hold, by a search that weights each column's
error with its cost after compensation. Columns are rounded in descending order of input power
(`desc_act`), but groups keep their columns ("static groups"), so codes stay in the original order.

Then codes and scales are refined in turns to reduce the error of the same products: each code given
all other codes (QuantEase, https://arxiv.org/abs/2309.01885), then all scales of a row by least
squares.

N rows, K inputs, G groups per row, g inputs per group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_export.computing import in_float64
from gemma_export.device import grain
from gemma_export.formats.codes import Codes, join, pack
from gemma_export.formats.format import Format
from gemma_export.quantize.round import search, shared_scale

_DAMPING = 0.01  # share of the mean power added to the diagonal; keeps the factor finite
BLOCK = 64  # columns whose errors are propagated together
REFINED = 3  # refinement passes; they remove a tenth of the error, mostly in the first pass
_EQUATIONS = 1 << 23  # coefficients of the linear systems solved in one batch
# Above this many inputs the factor is computed in float32 and nothing is refined: wide matrices
# take most of the time and gain least from it (3 % instead of 10 %).
WIDE = 4096
# Candidate scales cover these shares of a group's full range.
SHRINKS = tuple(1 - 0.04 * step for step in range(1, 13))


@dataclass(frozen=True, slots=True)
class Inputs:
    """Statistics of a matrix's inputs, computed once and used for every block of rows."""

    gram: Tensor  # (K, K) Σ x xᵀ
    damping: float  # added to its diagonal
    order: Tensor  # (K,) columns, most powerful first
    factor: Tensor  # (K, K), see `inverse_factor`
    cost: Tensor  # (K,) cost of a unit error in a column after compensation: 1 / (gram⁻¹)ᵢᵢ


def prepare(gram: Tensor, damping: float = _DAMPING) -> Inputs:
    """From Σ x xᵀ (K, K); `damping` is a share of its mean diagonal."""
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    added = damping * max(1e-12, float(in_float64(gram.diagonal()).mean()))
    factor = inverse_factor(gram, order, added)
    cost = gram.new_empty(len(gram))
    cost[order] = torch.linalg.vector_norm(factor, dim=0).square_().reciprocal_()
    return Inputs(gram, added, order, factor, cost)


def gptq(rows: Tensor, inputs: Inputs, fmt: Format, refined: int = REFINED) -> Codes:
    """Round (N, K) float32 rows for the given inputs."""
    step = max(1, grain(rows.device.type).weights // rows.shape[1])
    starts = range(0, len(rows), step)
    return join([_round_slice(rows[i : i + step], inputs, fmt, refined) for i in starts])


def inverse_factor(gram: Tensor, order: Tensor, damping: float) -> Tensor:
    """Upper triangular U with Uᵀ U = (gram + damping)⁻¹, columns in the given order: (K, K).

    Computed in float64 up to `WIDE` inputs, to bound memory; returned as float32.
    """
    square = gram[order][:, order]
    if len(gram) <= WIDE:
        square = in_float64(square)
    square.diagonal().add_(damping)
    torch.linalg.cholesky(square, out=square)
    torch.cholesky_inverse(square, out=square)
    torch.linalg.cholesky(square, upper=True, out=square)
    return square.float().to(gram.device)


def weighted_scales(groups: Tensor, cost: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero (N, G) of least error for (N, G, g); `cost` (G, g) weights the errors."""

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        steps = (groups / scale[..., None]).round_().add_(zero[..., None])
        steps.clamp_(0, (1 << fmt.bits) - 1).sub_(zero[..., None])
        return ((steps * scale[..., None] - groups).square_() * cost).sum(-1)

    return search(groups, fmt, SHRINKS, error)


def _round_slice(rows: Tensor, inputs: Inputs, fmt: Format, refined: int) -> Codes:
    count, width = rows.shape
    groups = rows.view(count, -1, fmt.group)  # (N, G, g)
    scale, zero = weighted_scales(groups, inputs.cost.view(-1, fmt.group), fmt)
    grid = _Grid(scale.T.contiguous(), zero.T.contiguous(), fmt)
    columns = rows.T.contiguous()
    steps = _round_columns(columns, grid, inputs)
    for _ in range(refined if width <= WIDE else 0):
        _descend(columns, steps, grid, inputs)
        grid.scale = _refit(rows, steps, grid, inputs)
    codes = (steps.view(-1, fmt.group, count) + grid.zero[:, None]).view(width, count)
    packed = pack(codes.T.to(torch.uint8), fmt.bits)
    zeros = pack(zero.to(torch.uint8), fmt.bits) if fmt.asymmetric else None
    return Codes(packed, grid.scale.T.half(), zeros)


@dataclass(slots=True)
class _Grid:
    """The values that a weight can be rounded to, per column."""

    scale: Tensor  # (G, N)
    zero: Tensor  # (G, N)
    fmt: Format

    def nearest(self, column: int, steps: Tensor) -> Tensor:
        """code - zero (N,) for weights in steps of the column's scales."""
        zero = self.zero[column // self.fmt.group]
        return steps.round().add_(zero).clamp_(0, (1 << self.fmt.bits) - 1).sub_(zero)

    def scale_of(self, column: int) -> Tensor:
        return self.scale[column // self.fmt.group]

    def weights(self, steps: Tensor) -> Tensor:
        """(K, N) code - zero → (K, N)"""
        width, count = steps.shape
        return (steps.view(-1, self.fmt.group, count) * self.scale[:, None]).view(width, count)


def _round_columns(columns: Tensor, grid: _Grid, inputs: Inputs) -> Tensor:
    """(K, N) weights → (K, N) code - zero, in `inputs.order`, compensating each error."""
    left, factor, places = columns[inputs.order], inputs.factor, inputs.order.tolist()
    steps = torch.empty_like(columns)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = torch.empty_like(left[start:stop])
        for i in range(start, stop):
            scale = grid.scale_of(places[i])
            steps[places[i]] = grid.nearest(places[i], left[i] / scale)
            error = (left[i] - steps[places[i]] * scale) / factor[i, i]
            left[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return steps


def _descend(columns: Tensor, steps: Tensor, grid: _Grid, inputs: Inputs) -> None:
    """Improve `steps` in place, column by column, each optimal given all other columns."""
    gram, damping = inputs.gram, inputs.damping
    off = columns - grid.weights(steps)
    pull = (gram @ off).add_(off, alpha=damping)  # (K, N): half the gradient of the error
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        moves = torch.empty_like(columns[start:stop])
        for i in range(start, stop):
            scale = grid.scale_of(i)
            best = grid.nearest(i, steps[i] + pull[i] / ((gram[i, i] + damping) * scale))
            moves[i - start] = (best - steps[i]) * scale
            steps[i] = best
            pull[i + 1 : stop].addr_(gram[i, i + 1 : stop], moves[i - start], alpha=-1)
        pull[stop:].addmm_(gram[stop:, start:stop], moves, alpha=-1)


def _refit(rows: Tensor, steps: Tensor, grid: _Grid, inputs: Inputs) -> Tensor:
    """(G, N) scales of least error for fixed codes; a scale that would move too far is kept."""
    group, (width, count) = grid.fmt.group, steps.shape
    size = width // group
    together = max(1, _EQUATIONS // max(size * size, width))
    solved = rows.new_empty(count, size)
    for start in range(0, count, together):
        held, targets = steps[:, start : start + together].T, rows[start : start + together]
        codes = held.reshape(-1, size, group)  # (n, G, g)
        matrix = rows.new_empty(len(codes), size, size)
        for g in range(size):  # normal equations between this group and all groups
            gram = inputs.gram[g * group : (g + 1) * group]
            matrix[:, g] = ((codes[:, g] @ gram).view_as(codes) * codes).sum(-1)
        moments = (targets @ inputs.gram).add_(targets, alpha=inputs.damping).view_as(codes)
        target = (moments * codes).sum(-1)  # (n, G)
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal.add_(codes.square().sum(-1), alpha=inputs.damping)
        # A group whose codes are all zero keeps its scale.
        tie = diagonal.mean(-1, keepdim=True).mul(1e-6).clamp_(min=1e-20)
        before = grid.scale[:, start : start + together].T
        diagonal.add_(tie)
        solved[start : start + together] = torch.linalg.solve(matrix, target + tie * before)
    scale = shared_scale(solved.T)
    stays = (scale < 0.5 * grid.scale) | (scale > 2 * grid.scale)
    return torch.where(stays, grid.scale, scale)
