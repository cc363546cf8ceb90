"""Axes: where a value lies, and which values get a line."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

_STEPS = (1, 2, 2.5, 5, 10)
_LINES = 4  # about so many on a linear axis
_FEW_DECADES = 2  # get lines in between
_DECADES = 12  # at most so many on a logarithmic axis


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis from `low` to `high`."""

    low: float
    high: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where the value lies between the ends: 0 to 1. What is outside is moved to the end."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.logarithmic:
            low, high, at = math.log10(low), math.log10(high), math.log10(at)
        return (at - low) / (high - low)

    def lines(self) -> list[float]:
        if self.logarithmic:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            between = (1, 2, 5) if last - first <= _FEW_DECADES else (1,)
            lines = [n * 10.0**power for power in range(first, last + 1) for n in between]
            return [line for line in lines if line <= self.high * 1.001]
        step = _step(self.high - self.low)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def linear(values: Iterable[float]) -> Scale:
    """An axis with all values and 0, so that a bar's length is its value."""
    known = [value for value in values if math.isfinite(value)]
    low, high = min([0.0, *known]), max([0.0, *known])
    if high - low < 1e-12 or not math.isfinite(high - low):
        return Scale(min(low, 0.0) if high - low >= 1e-12 else 0.0, 1.0)
    step = _step(high - low)
    return Scale(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)


def decades(values: Iterable[float]) -> Scale:
    """A logarithmic axis between powers of ten. Values of 0 and below lie on its left end."""
    known = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
    last = math.ceil(math.log10(max(known)) - 1e-9)
    first = max(math.floor(math.log10(min(known)) + 1e-9), last - _DECADES)
    return Scale(10.0**first, 10.0 ** max(last, first + 1), logarithmic=True)


SHARE = Scale(0.0, 1.0)


def _step(span: float) -> float:
    size = 10.0 ** math.floor(math.log10(span / _LINES))
    return next(step * size for step in _STEPS if span / (step * size) <= _LINES + 1)
