"""Says which colour and shape belong to which bundle."""

from collections.abc import Sequence

from gemma_runtime.report.collected import Column
from gemma_runtime.report.parts import Key, Legend


def bundles_legend(columns: Sequence[Column]) -> list[Legend]:
    """Nothing for a single bundle."""
    if len(columns) < 2:
        return []
    return [Legend(tuple(Key(one.label, one.style, one.shape) for one in columns))]
