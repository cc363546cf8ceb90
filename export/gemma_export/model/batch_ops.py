"""The reference's vocabulary for many sequences and few weights: whole matrices, gradients.

`TorchOps` streams a model past a few prompts; this one takes a layer, held in memory, past a whole
calibration set. Shapes: B batch, T tokens, M width, H query heads, K kv heads, D head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from gemma_export.model.config import LayerSpec
from gemma_export.model.ops import Weight
from gemma_export.model.torch_ops import TorchOps, rotate, soft_capped, split_heads, visible
from gemma_runtime.machine import describe_machine


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


@cache
def product_dtype() -> torch.dtype:
    """What large products of activations are computed in: bfloat16 where that is faster.

    Its rounding is a fiftieth of int4's; sums, residuals, norms and softmax stay float32. Intel's
    processors without matrix tiles take twice as long for it as for float32.
    """
    known = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    slow = "Intel" in describe_machine(()).cpu and not torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if known and not slow else torch.float32


class BatchOps(TorchOps):
    """Products in the weights' own dtype, the rest in float32; every operation has a gradient."""

    def project(self, x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
        matrices = [weight.rows(0, weight.shape[0]) for weight in weights]
        short = x.to(matrices[0].dtype)
        return [functional.linear(short, matrix).float() for matrix in matrices]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerSpec) -> Tensor:
        q = rotate(split_heads(q, layer.heads), layer.rope)  # (B, H, T, D)
        k = rotate(split_heads(k, layer.kv_heads), layer.rope)  # (B, K, T, D)
        v = split_heads(v, layer.kv_heads)
        seen = visible(q.shape[-2], layer.window)
        if layer.softcap is None:
            y = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, scale=layer.scale, enable_gqa=True
            )
        else:  # torch's fused attention has no softcap
            shared = layer.heads // layer.kv_heads
            k, v = (x.repeat_interleave(shared, 1) for x in (k, v))  # (B, H, T, D)
            scores = q @ k.transpose(-1, -2) * layer.scale  # (B, H, T, T)
            y = soft_capped(scores, layer.softcap).masked_fill(~seen, float("-inf")).softmax(-1) @ v
        return y.transpose(1, 2).flatten(-2)  # (B, T, H · D)

    def add_norm(
        self, x: Tensor, branch: Tensor, post: Weight, then: Weight
    ) -> tuple[Tensor, Tensor]:
        x = x + self.norm(branch, post)
        return x, self.norm(x, then)


class ObservingOps(BatchOps):
    """Notes what each projection multiplies, by the name of every weight of it: (B · T, inputs)."""

    def __init__(self, tokens: Tensor, epsilon: float, inputs: dict[str, Tensor]) -> None:
        super().__init__(tokens, epsilon)
        self._inputs = inputs

    def project(self, x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
        rows = x.flatten(0, -2)
        for weight in weights:  # one tensor for all of them
            self._inputs[weight.name] = rows
        return super().project(x, weights)


class GradientOps(BatchOps):
    """Keeps what each projection gives, and its gradient: by weight, (B, T, outputs)."""

    def __init__(self, tokens: Tensor, epsilon: float, outputs: dict[str, Tensor]) -> None:
        super().__init__(tokens, epsilon)
        self._outputs = outputs

    def project(self, x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
        found = super().project(x, weights)
        for weight, y in zip(weights, found, strict=True):
            y.retain_grad()
            self._outputs[weight.name] = y
        return found
