"""Rounds floats to codes. N rows, K inputs, G groups per row, g inputs per group.

A rounding is a function of one block of rows; `ROUNDINGS` lists them. Scales are rounded to values
that both float16 and bfloat16 hold before the weights are rounded, so containers with either type
hold the same numbers.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.linalg import vecdot

from gemma_export.formats.codes import Codes, join, pack
from gemma_export.formats.format import Format
from gemma_export.quantize.recipe import Rounding
from gemma_runtime.errors import RecipeError

# Candidate scales cover these shares of the full range: clipping a group's largest weight often
# costs less than coarser steps for all other weights.
_SHRINKS = (0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7)
# A scale moves the codes of large weights by less than a step, so that one of them can be hit.
NEARBY = tuple(1 + step / 128 for step in (*range(-4, 0), *range(1, 17)))
_LARGEST = 65280.0  # the largest scale that both float16 and bfloat16 hold
_SLICE = 1 << 17  # elements rounded at a time, so that temporaries fit the processor's cache


def round_rows(rows: Tensor, fmt: Format, rounding: Rounding) -> Codes:
    """Quantize (N, K) float32 rows."""
    return _by_slices(rows, fmt, lambda groups: ROUNDINGS[rounding](groups, fmt))


def round_weighted(rows: Tensor, fmt: Format, power: Tensor) -> Codes:
    """Quantize (N, K) float32 rows with the scales of least error of the products.

    The squared error of column k counts `power` (K,) times: its input's mean square. Codes are the
    nearest ones, so no weight is further off than a step. One input that is far larger than the
    others decides the scales of its groups.
    """
    by_group = power.view(-1, fmt.group)
    return _by_slices(rows, fmt, lambda groups: weighted(groups, fmt, by_group))


def check_reach(name: str, rows: Tensor, fmt: Format) -> None:
    """Raise RecipeError for weights that the largest scale doesn't reach: they would be cut off."""
    low, high = (float(value) for value in torch.aminmax(rows))
    middle = 1 << (fmt.bits - 1)
    steps = max(high, 0) - min(low, 0) if fmt.asymmetric else max(-low, high)
    reach = _LARGEST * (2 * middle - 1 if fmt.asymmetric else middle - 1)
    if not steps <= reach:
        raise RecipeError(
            f"{name} has weights from {low:.3g} to {high:.3g}, which {fmt} can't hold: its scales "
            f"end at {_LARGEST:.0f}; choose --quant none"
        )


def shared_scale(scale: Tensor) -> Tensor:
    """The nearest number that both bfloat16 and float16 hold, as float32; at least 2^-24.

    bfloat16 has 8 significant bits, float16 has 11, and fewer below 2^-14 but always 2^-24 steps.
    """
    return scale.bfloat16().half().float().clamp_(2.0**-24, _LARGEST)


def cover(low: Tensor, high: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero, (N, G) each, of codes that cover [low, high] and represent 0 exactly."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    top = (1 << fmt.bits) - 1
    if fmt.asymmetric:
        scale = shared_scale((high - low) / top)
        return scale, torch.round(-low / scale).clamp_(0, top)
    middle = 1 << (fmt.bits - 1)  # codes reach from -middle to middle - 1 around it
    scale = shared_scale(torch.maximum(-low / middle, high / (middle - 1)))
    return scale, torch.full_like(scale, middle)


def nearest(groups: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """(N, G, g) → scales and zeros, (N, G) each, that cover the whole range."""
    return cover(groups.amin(-1), groups.amax(-1), fmt)


def searched(groups: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Scales and zeros of least squared error among the candidate ranges, per group."""
    return search(
        groups, fmt, _SHRINKS, lambda scale, zero: _squared_error(groups, scale, zero, fmt)
    )


def weighted(groups: Tensor, fmt: Format, power: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros of least squared error among nearby ranges, columns weighted by (G, g)."""

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        missed = _steps(groups, scale, zero, fmt).mul_(scale[..., None]).sub_(groups)
        return missed.square_().mul_(power).sum(-1)

    return search(groups, fmt, NEARBY, error)


def search(
    groups: Tensor,
    fmt: Format,
    shrinks: Sequence[float],
    error: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Scale and zero, (N, G) each, with the least error among the full range and its shares."""
    low, high = groups.amin(-1), groups.amax(-1)
    best_scale, best_zero = cover(low, high, fmt)
    best = error(best_scale, best_zero)
    for shrink in shrinks:
        scale, zero = cover(low * shrink, high * shrink, fmt)
        current = error(scale, zero)
        better = current < best
        best = torch.where(better, current, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


# Roundings that use the weights alone, no calibration text.
ROUNDINGS: Mapping[Rounding, Callable[[Tensor, Format], tuple[Tensor, Tensor]]] = {
    "nearest": nearest,
    "searched": searched,
}


_Scales = Callable[[Tensor], tuple[Tensor, Tensor]]  # (N, G, g) → scales and zeros, (N, G) each


def _by_slices(rows: Tensor, fmt: Format, scales: _Scales) -> Codes:
    step = max(1, _SLICE // rows.shape[1])
    return join([_round(rows[i : i + step], fmt, scales) for i in range(0, len(rows), step)])


def _round(rows: Tensor, fmt: Format, scales: _Scales) -> Codes:
    groups = rows.view(len(rows), -1, fmt.group)  # (N, G, g)
    scale, zero = scales(groups)
    codes = _steps(groups, scale, zero, fmt).add_(zero[..., None])
    return Codes(
        pack(_bytes(codes).flatten(1), fmt.bits),
        scale.half(),
        pack(_bytes(zero), fmt.bits) if fmt.asymmetric else None,
    )


def _steps(groups: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> Tensor:
    """code - zero, still float: (N, G, g)."""
    steps = (groups * scale.reciprocal()[..., None]).round_()
    if not fmt.asymmetric:
        middle = 1 << (fmt.bits - 1)
        return steps.clamp_(-middle, middle - 1)
    return steps.clamp_(-zero[..., None], (1 << fmt.bits) - 1 - zero[..., None])


def _squared_error(groups: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> Tensor:
    """Σ (w - s·q)² minus the constant Σ w²: s (s Σ q² - 2 Σ w q), (N, G)."""
    steps = _steps(groups, scale, zero, fmt)
    error: Tensor = scale * (scale * vecdot(steps, steps) - 2 * vecdot(groups, steps))
    return error


def _bytes(codes: Tensor) -> Tensor:
    return codes.to(torch.int16).to(torch.uint8)  # five times faster than a direct conversion
