"""Pareto fronts of vectors in which smaller is better."""

import math
from collections.abc import Sequence

Vector = tuple[float, ...]


def dominates(a: Vector, b: Vector) -> bool:
    """Whether `a` is nowhere worse than `b`, and somewhere better."""
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def front(vectors: Sequence[Vector]) -> list[int]:
    """The indices of vectors that no other one dominates. Equal vectors stand there together."""
    return [
        index
        for index, vector in enumerate(vectors)
        if not any(dominates(other, vector) for other in vectors)
    ]


def compromise(vectors: Sequence[Vector]) -> int:
    """The index of the vector nearest to the ideal one, which has the best of each component.

    The Euclidean distance, after each component is divided by its range: compromise programming
    (Zeleny, Multiple Criteria Decision Making, 1982). Of several, the first.
    """
    columns = list(zip(*vectors, strict=True))
    lows = [min(column) for column in columns]
    spans = [max(column) - low or 1.0 for column, low in zip(columns, lows, strict=True)]

    def distance(vector: Vector) -> float:
        parts = zip(vector, lows, spans, strict=True)
        return math.hypot(*((value - low) / span for value, low, span in parts))

    return min(range(len(vectors)), key=lambda index: distance(vectors[index]))
