"""Shared by Core ML and Core AI: ring caches read before they are written, float16 headroom."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from gemma_export.model.config import PER_LAYER_PROJECTION, GemmaConfig, cache_layout
from gemma_export.targets import ExportJob, Geometry
from gemma_runtime.errors import TargetError
from gemma_runtime.manifest import LayerCache

_ATTENTION_OUT, _UP, _DOWN, _PER_LAYER_OUT = (
    f".{name}.weight"
    for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "per_layer_projection")
)


def ring_caches(target: str, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
    """Local layers get exactly `window` slots, since attention reads the ring before writing."""
    caches = cache_layout(config, geometry.context_length, None if geometry.full_cache else 0)
    shortest = min(cache.slots for cache in caches)
    if geometry.prefill_length > shortest:  # a chunk would write one slot twice
        raise TargetError(
            f"--prefill is {geometry.prefill_length}, but {target}'s shortest cache holds "
            f"{shortest} tokens; choose --prefill {shortest} or less"
        )
    return caches


@dataclass(frozen=True, slots=True)
class Headroom:
    """Powers of two that values are multiplied by so that float16 holds them.

    The residual's factor is folded into the embedding and into the norms after each branch; RMSNorm
    divides it out. A product that a norm follows has a factor of its own, which that norm divides
    out. Without norms after the branches, their products have the residual's factor.
    """

    residual: float  # of the values between layers
    products: Mapping[str, float]  # by a matrix's name: of its input, and so of what it gives

    @classmethod
    def of(cls, job: ExportJob) -> Self:
        """From the largest values that the reference measured."""
        if job.config.post_norms:
            products = {
                name: headroom_factor(peak)
                for name, peak in job.max_products.items()
                if name.endswith((_DOWN, _PER_LAYER_OUT)) or name == PER_LAYER_PROJECTION
            }
            return cls(headroom_factor(job.max_residual), products)
        added = [n for n in job.config.tensor_shapes() if n.endswith((_ATTENTION_OUT, _DOWN))]
        peaks = (job.max_products.get(name, 0.0) for name in added)
        residual = headroom_factor(max(job.max_residual, *peaks))
        return cls(residual, dict.fromkeys(added, residual))

    def matrix(self, name: str) -> tuple[float, float]:
        """What a matrix's input and its output are multiplied by.

        The products of gates get their factors by way of what is gated. The gate of per-layer
        embeddings reads the residual, whose factor is removed before the gate's gelu.
        """
        if name.endswith(_UP):
            return 1.0, self.product(name.removesuffix(_UP) + _DOWN)
        if name.endswith(".per_layer_input_gate.weight"):
            return 1.0, 1 / self.residual
        is_gated = name.endswith((_DOWN, _PER_LAYER_OUT))
        return (1.0 if is_gated else self.product(name)), 1.0

    def per_layer(self, layer: int) -> float:
        """What a layer's part of the per-layer embeddings is multiplied by, for its product."""
        return self.product(f"model.layers.{layer}{_PER_LAYER_OUT}")

    def norm(self, gain: str) -> tuple[float, float]:
        """The factor in a norm's input, and the one that its output gets."""
        layer, _, name = gain.removesuffix(".weight").rpartition(".")
        match name:
            case "q_norm" | "k_norm":
                return 1.0, 1.0
            case "post_attention_layernorm":
                return 1.0, self.residual
            case "post_feedforward_layernorm":
                return self.product(layer + _DOWN), self.residual
            case "post_per_layer_input_norm":
                return self.product(layer + _PER_LAYER_OUT), self.residual
            case "per_layer_projection_norm":
                return self.residual * self.product(PER_LAYER_PROJECTION), 1.0
        return self.residual, 1.0

    def product(self, matrix: str) -> float:
        return self.products.get(matrix, 1.0)


def headroom_factor(max_abs: float) -> float:
    """A power of two that scales the largest value below 2^14, a quarter of float16's range."""
    factor = 1.0
    while max_abs * factor > 2**14:
        factor /= 2
    return factor
