"""What the calls of a program reached, for the question whether float16 holds it."""

import heapq
from dataclasses import dataclass, field

import numpy as np

from gemma_runtime.mil.blob import Array

_NO_SIGN = np.uint16(0x7FFF)


@dataclass(frozen=True, slots=True)
class Reached:
    """An operation's largest magnitude over all calls."""

    name: str
    kind: str
    max_abs: float


@dataclass(slots=True)
class Audit:
    """`largest(10)` are the ten operations that came nearest to overflowing."""

    first_not_finite: str | None = None  # the operation's name
    _reached: dict[str, Reached] = field(default_factory=dict)

    @property
    def max_abs(self) -> float:
        return max((reached.max_abs for reached in self._reached.values()), default=0.0)

    @property
    def max_operation(self) -> str:
        return next((reached.name for reached in self.largest(1)), "")

    def largest(self, count: int) -> list[Reached]:
        """The operations with the largest finite values, the largest first."""
        return heapq.nlargest(count, self._reached.values(), key=lambda reached: reached.max_abs)

    def by_kind(self) -> dict[str, float]:
        """The largest magnitude of each kind of operation."""
        found: dict[str, float] = {}
        for reached in self._reached.values():
            found[reached.kind] = max(found.get(reached.kind, 0.0), reached.max_abs)
        return found

    def note(self, name: str, kind: str, value: Array) -> None:
        if value.dtype.kind != "f" or value.size == 0:
            return
        largest = _max_abs(value)
        if not np.isfinite(largest):
            self.first_not_finite = self.first_not_finite or name
        elif name not in self._reached or largest > self._reached[name].max_abs:
            self._reached[name] = Reached(name, kind, largest)


def _max_abs(value: Array) -> float:
    if value.dtype != np.float16:
        return float(np.abs(value).max())
    # Without its sign, a float16 is ordered as its bits are; Inf and NaN are the largest.
    bits = np.ascontiguousarray(value).view(np.uint16) & _NO_SIGN
    return float(bits.max().view(np.float16))
