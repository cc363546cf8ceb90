"""The operations that the decoder calls and every target implements.

Those of `RegularOps` are called for irregular models only: see `GemmaConfig.irregular`.

Their granularity follows the runtimes' fused kernels: one call maps to at most one fused kernel.
Shapes: B batch, T new tokens, M width, H query heads, K kv heads, D head size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from gemma_export.model.config import LayerSpec


class Weight(Protocol):
    """A named weight that is read by blocks of rows."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def factors(self) -> Tensor | None:
        """(M,) factors of a table's columns, or None. The final norm gain is divided by them."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), float32."""
        ...


V = TypeVar("V")  # torch.Tensor, the name of an ONNX value, a MIL Var
W = TypeVar("W", bound=Weight, contravariant=True)


def lookup_scale(table: Weight, scale: float) -> Tensor | float:
    """The multiplier that turns a table's rows into embeddings: a number, or (M,)."""
    return scale if table.factors is None else scale / table.factors


class LayerOps(Protocol[V, W]):
    """What the layers of decoders and encoders call."""

    def embed(self, table: W, scale: float) -> V:
        """The table's rows of the new tokens, times scale, divided by its factors: (B, T, M)."""
        ...

    def norm(self, x: V, gain: W) -> V:
        """RMSNorm in float32: x / rms(x) · (1 + gain)."""
        ...

    def head_norm(self, x: V, gain: W, heads: int) -> V:
        """RMSNorm over each head of x, (B, T, heads · D)."""
        ...

    def project(self, x: V, weights: Sequence[W]) -> list[V]:
        """x · wᵀ for each weight."""
        ...

    def value_norm(self, v: V, layer: LayerSpec) -> V:
        """RMSNorm without a gain over each head of a layer's values, (B, T, K · D)."""
        ...

    def attend(self, q: V, k: V, v: V, layer: LayerSpec) -> V:
        """Rope, cache, scale, softcap, mask, softmax: (B, T, H · D) from q and new k and v."""
        ...

    def attend_shared(self, q: V, layer: LayerSpec) -> V:
        """Like `attend`, to the keys and values of `layer.source`, of this call and before.

        q may be narrowed to the wanted positions.
        """
        ...

    def add_norm(self, x: V, branch: V, post: W | None, then: W) -> tuple[V, V]:
        """y = x + norm(branch, post), or x + branch; returns y and norm(y, then)."""
        ...

    def scaled_add_norm(self, x: V, branch: V, post: W, factor: W, then: W) -> tuple[V, V]:
        """y = factor · (x + norm(branch, post)); returns y and norm(y, then)."""
        ...

    def add(self, a: V, b: V) -> V:
        """a + b."""
        ...

    def scaled(self, x: V, factor: float) -> V:
        """x · factor."""
        ...

    def columns(self, x: V, part: int, parts: int) -> V:
        """One of `parts` equal parts of x's last dimension."""
        ...

    def geglu(self, gate: V, up: V) -> V:
        """gelu(gate) · up, with the tanh form of gelu."""
        ...

    def wanted(self, x: V) -> V:
        """The positions of x whose logits the caller asked for."""
        ...


class Ops(LayerOps[V, W], Protocol[V, W]):
    """The operations of decoders."""

    def logits(self, x: V, head: W, softcap: float | None) -> V:
        """y = x · headᵀ; returns softcap · tanh(y / softcap), or y if softcap is None."""
        ...


class EncoderOps(LayerOps[V, W], Protocol[V, W]):
    """The operations of encoders. Their `attend` has no caches, and sees later tokens too."""

    def mean(self, x: V) -> V:
        """The mean over all tokens of x, (B, T, M): (B, M)."""
        ...

    def unit(self, x: V) -> V:
        """x divided by its length, over the last dimension."""
        ...


class RegularOps(Generic[V, W]):
    """Base for targets that refuse irregular models, so that nothing calls these operations."""

    def value_norm(self, v: V, layer: LayerSpec) -> V:
        raise AssertionError(layer)

    def attend_shared(self, q: V, layer: LayerSpec) -> V:
        raise AssertionError(layer)

    def scaled_add_norm(self, x: V, branch: V, post: W, factor: W, then: W) -> tuple[V, V]:
        raise AssertionError(factor.name)

    def add(self, a: V, b: V) -> V:
        raise AssertionError("add")

    def scaled(self, x: V, factor: float) -> V:
        raise AssertionError(factor)

    def columns(self, x: V, part: int, parts: int) -> V:
        raise AssertionError(part)
