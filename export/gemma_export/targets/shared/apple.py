"""Shared by Core ML and Core AI: ring caches read before they are written, float16 headroom."""

from gemma_export.model.config import ATTENTION_OUT, DOWN, GemmaConfig, cache_layout
from gemma_export.targets import Geometry
from gemma_runtime.errors import TargetError
from gemma_runtime.manifest import LayerCache


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


def is_added(config: GemmaConfig, name: str) -> bool:
    """Whether a matrix's products are added to the residual as they are, without a norm."""
    return not config.post_norms and name.removesuffix(".weight").endswith((*ATTENTION_OUT, *DOWN))


def headroom_factor(max_abs: float) -> float:
    """A power of two that scales the largest residual below 2^14, a quarter of float16's range.

    It is folded into the embedding and into the norms after each branch; without such norms, the
    inputs of a branch's last matrix are multiplied by it. RMSNorm divides it out.
    """
    factor = 1.0
    while max_abs * factor > 2**14:
        factor /= 2
    return factor
