"""Records the largest values of every operation, to show whether float16 can hold them."""

import heapq
from dataclasses import dataclass, field

import numpy as np

from gemma_runtime.mil.blob import Array

_WITHOUT_SIGN = np.uint16(0x7FFF)


@dataclass(frozen=True, slots=True)
class Peak:
    """The largest finite magnitude of one operation's result, over all calls."""

    name: str
    kind: str
    max_abs: float


@dataclass(slots=True)
class Audit:
    """Peaks by operation. `largest(10)` returns the ten operations nearest to overflowing."""

    first_not_finite: str | None = None  # name of the first operation that gave Inf or NaN
    _peaks: dict[str, Peak] = field(default_factory=dict)

    @property
    def max_abs(self) -> float:
        return max((peak.max_abs for peak in self._peaks.values()), default=0.0)

    def largest(self, count: int) -> list[Peak]:
        """The operations with the largest finite values, the largest first."""
        return heapq.nlargest(count, self._peaks.values(), key=lambda peak: peak.max_abs)

    def record(self, name: str, kind: str, value: Array) -> None:
        if value.dtype.kind != "f" or value.size == 0:
            return
        largest = _max_abs(value)
        if not np.isfinite(largest):
            self.first_not_finite = self.first_not_finite or name
        elif name not in self._peaks or largest > self._peaks[name].max_abs:
            self._peaks[name] = Peak(name, kind, largest)


def _max_abs(value: Array) -> float:
    if value.dtype != np.float16:
        return float(np.abs(value).max())
    # Without the sign bit, float16 values sort like their bits; Inf and NaN sort last.
    bits = np.ascontiguousarray(value).view(np.uint16) & _WITHOUT_SIGN
    return float(bits.max().view(np.float16))
