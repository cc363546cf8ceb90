"""Finds the known faults that explain wrong logits."""

from collections.abc import Iterator
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_conformance.faults import Fault, faults_of, logits

MOST = 3  # faults at once
Array = NDArray[np.float64]


def log_probabilities(rows: Array) -> Array:
    """Of logits (T, V), along V."""
    shifted = rows - rows.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def difference(found: Array, right: Array, as_log_probabilities: bool = False) -> float:
    """The largest |Δ|; infinite for other shapes or what is not a number."""
    if found.shape != right.shape or not np.isfinite(found).all():
        return float("inf")
    if as_log_probabilities:
        right = log_probabilities(right)
    return float(np.abs(found - right).max())


class Mutants:
    """The models with known faults of one checkpoint: `model` is the right one."""

    def __init__(self, model: Any, tokens: tuple[int, ...]) -> None:
        self.faults = tuple(faults_of(model))
        self._model, self._tokens = model, list(tokens)
        self._logits = cache(self._compute)

    def logits(self, *faults: Fault) -> Array:
        """The logits of the model with these faults, (T, V)."""
        return self._logits(faults)

    def effect(self, fault: Fault) -> float:
        """How far the fault moves a logit."""
        return difference(self.logits(fault), self.logits())

    def explain(
        self, found: Array, positions: slice, tolerance: float, as_log_probabilities: bool = False
    ) -> tuple[Fault, ...]:
        """The fewest faults with which the model computes `found` at `positions`; () if none do."""
        for count in range(1, MOST + 1):
            best: tuple[Fault, ...] = ()
            nearest = tolerance
            for faults in self._sets(count):
                right = self.logits(*faults)[positions]
                distance = difference(found, right, as_log_probabilities)
                if distance <= nearest:
                    best, nearest = faults, distance
            if best:
                return best
        return ()

    def _sets(self, count: int) -> Iterator[tuple[Fault, ...]]:
        """Sets of faults of different traits."""
        for faults in combinations(self.faults, count):
            if len({fault.trait for fault in faults}) == count:
                yield faults

    def _compute(self, faults: tuple[Fault, ...]) -> Array:
        result: Array = logits(self._model, self._tokens, faults).numpy().astype(np.float64)
        return result
