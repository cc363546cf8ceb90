"""Rotary embedding's angles, for the reference and for the tables of every target."""

import numpy as np
from numpy.typing import NDArray

from gemma_export.config import Rope


def rope_angles(rope: Rope, length: int, width: int) -> NDArray[np.float64]:
    """position / factor · base^(-2i / D): (length, D / 2)."""
    frequency = rope.base ** (-np.arange(0, width, 2) / width)
    return np.outer(np.arange(length) / rope.factor, frequency)
