"""Already quantized checkpoints: which of their codes can be kept exactly in one of our formats.

Such a checkpoint has two methods in addition to `Checkpoint`'s. A recipe with the rounding `kept`
uses them. Matrices that can't be kept are rounded to the rule's format, and reported.
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
    """How the source stores a matrix."""

    kind: str  # the source's name for it, e.g. Q4_0, BF16, gptq
    format: Format | None = None  # our format with the same codes; None if there is none
    loss: str = ""  # what is rounded although the codes are kept; "" if nothing is

    @property
    def is_exact(self) -> bool:
        return not self.loss


@runtime_checkable
class Prequantized(Protocol):
    """The methods that an already quantized checkpoint has in addition."""

    def stored(self, name: str) -> Stored:
        """How a matrix is stored. May read it once, to test whether it is on the Q4_0 grid."""
        ...

    def codes(self, name: str, start: int, stop: int) -> Codes:
        """Codes of rows [start, stop) in the format that `stored` returns."""
        ...


def grid_stored(checkpoint: Checkpoint, name: str, kind: str, dtype: torch.dtype) -> Stored:
    """Test whether float weights are on the Q4_0 grid; a few rows first, to fail early."""
    shape = checkpoint.config.tensor_shapes()[name]
    probe = (0, min(_PROBED, shape[0]))
    for span in (probe, *row_blocks(shape)):
        if grid_codes(checkpoint.rows(name, *span), dtype) is None:
            return Stored(kind)
    return Stored(f"{kind} on the Q4_0 grid", INT4)
