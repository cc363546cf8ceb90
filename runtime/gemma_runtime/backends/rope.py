"""Angles of the rotary embedding, for the reference, for graph tables and for graph inputs."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemma_runtime.manifest import Rope


def rope_angles(rope: Rope, positions: ArrayLike, width: int) -> NDArray[np.float64]:
    """position / factor · base^(-2i / D): (T, D / 2); 0 in the pairs that don't turn."""
    frequency = rope.base ** (-np.arange(0, width, 2) / width)
    frequency[int(rope.rotated * width // 2) :] = 0
    return np.outer(np.asarray(positions) / rope.factor, frequency)
