"""The vocabulary that the decoder is written in, and that every target implements.

Granularity follows the fused kernels of the runtimes: one call here is at most one of them there.
Shapes: B batch, T new tokens, M width, H query heads, K kv heads, D head size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from gemma_export.model.config import LayerSpec


class Weight(Protocol):
    """A named weight, read a block of rows at a time."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def factors(self) -> Tensor | None:
        """(M,) by which a table's columns are multiplied; the final gain is divided by them."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), float32."""
        ...


V = TypeVar("V")  # torch.Tensor, the name of an ONNX value, a MIL Var
W = TypeVar("W", bound=Weight, contravariant=True)


def lookup_scale(table: Weight, scale: float) -> Tensor | float:
    """What a table's rows are multiplied with to be embeddings: one number, or (M,)."""
    return scale if table.factors is None else scale / table.factors


class Ops(Protocol[V, W]):
    def embed(self, table: W, scale: float) -> V:
        """The new tokens' rows of the table, times scale, without its factors: (B, T, M)."""
        ...

    def norm(self, x: V, gain: W) -> V:
        """RMSNorm in float32: x / rms(x) · (1 + gain)."""
        ...

    def head_norm(self, x: V, gain: W, heads: int) -> V:
        """The same over each head: x is (B, T, heads · D)."""
        ...

    def project(self, x: V, weights: Sequence[W]) -> list[V]:
        """x · wᵀ for each of several weights of one input."""
        ...

    def attend(self, q: V, k: V, v: V, layer: LayerSpec) -> V:
        """Rope, cache, scale, softcap, mask, softmax: (B, T, H · D) from q and new k and v."""
        ...

    def add_norm(self, x: V, branch: V, post: W, then: W) -> tuple[V, V]:
        """x + norm(branch, post), and norm(that, then)."""
        ...

    def geglu(self, gate: V, up: V) -> V:
        """gelu(gate) · up, with the tanh form of gelu."""
        ...

    def wanted(self, x: V) -> V:
        """The positions whose logits the caller asked for."""
        ...

    def logits(self, x: V, table: W, softcap: float | None) -> V:
        """x · tableᵀ, then cap · tanh(· / cap) where there is a cap."""
        ...
