"""What Core ML and Core AI have in common: rings read before they are written, and float16."""

from gemma_export.model.config import GemmaConfig, cache_layout
from gemma_export.targets import Geometry
from gemma_runtime.errors import TargetError
from gemma_runtime.manifest import LayerCache


def ring_caches(target: str, config: GemmaConfig, geometry: Geometry) -> tuple[LayerCache, ...]:
    """A ring of exactly the window: it is read before it is written."""
    caches = cache_layout(config, geometry.context_length, None if geometry.full_cache else 0)
    shortest = min(cache.slots for cache in caches)
    if geometry.prefill_length > shortest:  # a chunk would write one slot twice
        raise TargetError(
            f"--prefill is {geometry.prefill_length}, and {target}'s shortest cache holds "
            f"{shortest} tokens; give --prefill {shortest} or less"
        )
    return caches


def headroom_factor(max_abs: float) -> float:
    """A power of two that brings the largest residual below 2^14, a quarter of float16's range.

    Norms don't see it: they divide by the mean square. So embedding and branches may carry it.
    """
    factor = 1.0
    while max_abs * factor > 2**14:
        factor /= 2
    return factor
