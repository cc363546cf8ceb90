"""A checkpoint whose columns are multiplied by factors, which the weights before them undo.

The factors make a matrix's inputs alike, so runtimes that round inputs to int8 lose less
(SmoothQuant, https://arxiv.org/abs/2211.10438). Inputs are divided for free: by the gain of the
norm before the matrix, or for `down_proj` by the rows of `up_proj`. The inputs of `o_proj` are left
alone; factors there gained nothing.

Factors of a tied head are those of the table too, so each looked-up row is divided by them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from gemma_export.model.decoder import norm_before
from gemma_export.quantize.calibrate.balance import balanced, divided_gain
from gemma_export.quantize.calibrate.rewritten import RewrittenCheckpoint


@dataclass(frozen=True, slots=True)
class SmoothedCheckpoint(RewrittenCheckpoint):
    """A checkpoint with column factors; its model computes the same logits."""

    factors: Mapping[str, Tensor]  # matrix → (K,) factors of its columns

    @property
    def head_factors(self) -> Tensor | None:
        """(M,) factors of the head's columns."""
        return self.factors.get(self.config.head)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        values, head = self.source.rows(name, start, stop), self.head_factors
        if head is not None and name == self.config.head:
            return values * head
        if head is not None and name == norm_before(self.config, len(self.config.kinds)):
            return divided_gain(values, head[start:stop])
        return balanced(name, values, self.factors, start)
