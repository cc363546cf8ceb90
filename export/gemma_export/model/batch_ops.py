"""Torch operations for calibration: one layer's weights in memory, many sequences, gradients.

`TorchOps` instead streams all of a model's weights over a few prompts.
Shapes: B batch, T tokens, M width, H query heads, K kv heads, D head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from gemma_export.model.config import LayerSpec
from gemma_export.model.ops import Weight
from gemma_export.model.torch_ops import TorchOps, soft_capped, split_heads, visible


@dataclass(frozen=True, slots=True)
class HeldWeight:
    """A weight in memory."""

    name: str
    values: Tensor
    factors: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]


def hold(tensors: Mapping[str, Tensor]) -> dict[str, HeldWeight]:
    return {name: HeldWeight(name, values) for name, values in tensors.items()}


class BatchOps(TorchOps):
    """Computes products in the weights' dtype, the rest in float32; supports gradients."""

    def project(self, x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
        matrices = [weight.rows(0, weight.shape[0]) for weight in weights]
        short = x.to(matrices[0].dtype)
        return [functional.linear(short, matrix).float() for matrix in matrices]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerSpec) -> Tensor:
        mask = visible(k.shape[-2], layer.window, q.device)[-q.shape[-2] :]
        if layer.softcap is None:
            return functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=layer.scale, enable_gqa=True
            )
        # torch's fused attention has no softcap.
        return _attention(q, k, layer, mask) @ _per_query_head(v, layer)

    def _watched(self, x: Tensor) -> Tensor:
        return x  # nobody asks for the largest residual


class ObservingOps(BatchOps):
    """Records the input of each projection, (B · T, inputs), by the name of each of its weights."""

    def __init__(self, tokens: Tensor, epsilon: float) -> None:
        super().__init__(tokens, epsilon)
        self.inputs: dict[str, Tensor] = {}

    def project(self, x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
        rows = x.flatten(0, -2)
        for weight in weights:  # all share one tensor
            self.inputs[weight.name] = rows
        return super().project(x, weights)


def _attention(q: Tensor, k: Tensor, layer: LayerSpec, mask: Tensor) -> Tensor:
    """The weights of queries (B, H, T, D) on keys (B, K, T, D), with a softcap: (B, H, T, T)."""
    scores = q @ _per_query_head(k, layer).transpose(-1, -2) * layer.scale
    return soft_capped(scores, layer.softcap).masked_fill(~mask, float("-inf")).softmax(-1)


def _per_query_head(x: Tensor, layer: LayerSpec) -> Tensor:
    """(B, K, T, D) → (B, H, T, D)."""
    return x.repeat_interleave(layer.heads // layer.kv_heads, 1)


class CachingOps(BatchOps):
    """Records what would be cached, but before rope, and how much attention it gets."""

    keys: Tensor | None = None  # (B, K, T, D); None in a layer that reads another's cache
    values: Tensor | None = None  # (B, K, T, D)
    attention: Tensor  # (B, K, T): squared weights, summed over the queries and their heads

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerSpec) -> Tensor:
        self.keys, self.values = (split_heads(x, layer.kv_heads) for x in (k, v))
        return super().attend(q, k, v, layer)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerSpec) -> Tensor:
        mask = visible(q.shape[-2], layer.window, q.device)
        weights = _attention(q, k, layer, mask)  # (B, H, T, T)
        received = weights.square().sum(-2)  # (B, H, T)
        B, _, T = received.shape
        self.attention = received.view(B, layer.kv_heads, -1, T).sum(2)
        return weights @ _per_query_head(v, layer)


class GradientOps(BatchOps):
    """Records each projection's output, (B, T, outputs), with its gradient, by weight name."""

    def __init__(self, tokens: Tensor, epsilon: float) -> None:
        super().__init__(tokens, epsilon)
        self.outputs: dict[str, Tensor] = {}

    def project(self, x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
        outputs = super().project(x, weights)
        for weight, y in zip(weights, outputs, strict=True):
            y.retain_grad()
            self.outputs[weight.name] = y
        return outputs
