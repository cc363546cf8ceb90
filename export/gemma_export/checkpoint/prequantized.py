"""Sources that hold codes already: what of them fits a grid of ours exactly, and what doesn't.

A checkpoint that can tell offers two methods beside `Checkpoint`'s. A recipe asks for them with the
rounding `kept`; what can't be kept is rounded to the rule's own format, and named.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from gemma_export.checkpoint import Checkpoint
from gemma_export.checkpoint.grid import grid_codes
from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.codes import Codes
from gemma_export.formats.format import INT4, Format

_PROBED = 8  # rows


@dataclass(frozen=True, slots=True)
class Stored:
    """How the source holds a matrix."""

    kind: str  # its own word, e.g. Q4_0, BF16, gptq
    format: Format | None = None  # that takes its codes; None where none does
    is_exact: bool = True  # False: scales are rounded to float16


@runtime_checkable
class Prequantized(Protocol):
    """Beside `Checkpoint`."""

    def stored(self, name: str) -> Stored:
        """How a matrix is held; may read it once, to see whether it lies on a grid."""
        ...

    def codes(self, name: str, start: int, stop: int) -> Codes:
        """Rows [start, stop) in the format that `stored` names."""
        ...


def grid_stored(checkpoint: Checkpoint, name: str, kind: str, dtype: torch.dtype) -> Stored:
    """Whether float weights lie on the Q4_0 grid: a few rows tell at once where they don't."""
    shape = checkpoint.config.tensor_shapes()[name]
    probe = (0, min(_PROBED, shape[0]))
    for span in (probe, *row_blocks(shape)):
        if grid_codes(checkpoint.rows(name, *span), dtype) is None:
            return Stored(kind)
    return Stored(f"{kind} on the Q4_0 grid", INT4)
