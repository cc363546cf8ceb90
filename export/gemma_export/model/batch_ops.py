"""Torch operations for calibration: one layer's weights in memory, many sequences, gradients.

`TorchOps` instead streams all of a model's weights over a few prompts.
Shapes: B batch, T tokens, M width, H query heads, K kv heads, D head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from gemma_export.model.config import LayerSpec
from gemma_export.model.ops import Weight
from gemma_export.model.torch_ops import TorchOps, soft_capped, visible
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
    """The dtype of large matrix products: bfloat16 if it is faster than float32.

    Its rounding error is a fiftieth of int4's. Sums, residuals, norms and softmax stay float32.
    Intel processors without matrix tiles (AMX) take twice as long for bfloat16 as for float32.
    """
    is_supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    is_slow = "Intel" in describe_machine(()).cpu and not torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if is_supported and not is_slow else torch.float32


class BatchOps(TorchOps):
    """Computes products in the weights' dtype, the rest in float32; supports gradients."""

    def project(self, x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
        matrices = [weight.rows(0, weight.shape[0]) for weight in weights]
        short = x.to(matrices[0].dtype)
        return [functional.linear(short, matrix).float() for matrix in matrices]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerSpec) -> Tensor:
        mask = visible(k.shape[-2], layer.window)[-q.shape[-2] :]
        if layer.softcap is None:
            return functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=layer.scale, enable_gqa=True
            )
        # torch's fused attention has no softcap.
        shared = layer.heads // layer.kv_heads
        k, v = (x.repeat_interleave(shared, 1) for x in (k, v))  # (B, H, T, D)
        scores = q @ k.transpose(-1, -2) * layer.scale  # (B, H, N, T)
        return soft_capped(scores, layer.softcap).masked_fill(~mask, float("-inf")).softmax(-1) @ v

    def add_norm(
        self, x: Tensor, branch: Tensor, post: Weight, then: Weight
    ) -> tuple[Tensor, Tensor]:
        x = x + self.norm(branch, post)
        return x, self.norm(x, then)


class ObservingOps(BatchOps):
    """Records the input of each projection, (B · T, inputs), by the name of each of its weights."""

    def __init__(self, tokens: Tensor, epsilon: float, inputs: dict[str, Tensor]) -> None:
        super().__init__(tokens, epsilon)
        self._inputs = inputs

    def project(self, x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
        rows = x.flatten(0, -2)
        for weight in weights:  # all share one tensor
            self._inputs[weight.name] = rows
        return super().project(x, weights)


class GradientOps(BatchOps):
    """Records each projection's output, (B, T, outputs), with its gradient, by weight name."""

    def __init__(self, tokens: Tensor, epsilon: float, outputs: dict[str, Tensor]) -> None:
        super().__init__(tokens, epsilon)
        self._outputs = outputs

    def project(self, x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
        outputs = super().project(x, weights)
        for weight, y in zip(weights, outputs, strict=True):
            y.retain_grad()
            self._outputs[weight.name] = y
        return outputs
