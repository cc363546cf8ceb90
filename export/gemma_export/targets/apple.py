"""What Core ML and Core AI have in common: static chunks whose masks and slots the caller brings.

Values are float16. A padded token is written to a trash slot that no mask shows.
"""

from collections.abc import Mapping, Sequence

from gemma_export.config import GemmaConfig, cache_layout
from gemma_export.quantize.recipe import Format
from gemma_export.targets import Geometry
from gemma_runtime.errors import TargetError
from gemma_runtime.manifest import AttentionKind, Graph, LayerCache, TensorSpec

# Rows after the slots: padded tokens are written there. A multiple of 32 suits the Neural Engine.
TRASH = 32


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


def check_formats(target: str, formats: Mapping[str, Format]) -> None:
    """int4 in symmetric groups, and float16."""
    for name, form in formats.items():
        if not (form.is_float or (form.bits == 4 and not form.asymmetric)):
            raise TargetError(
                f"{target} takes int4 in symmetric groups and float16, not {form}, which {name} "
                "would be: --quant int4 or none"
            )


def function_lengths(geometry: Geometry) -> dict[str, int]:
    """Tokens that each function takes."""
    return {"prefill": geometry.prefill_length, "decode": 1}


def make_graphs(
    file: str, config: GemmaConfig, caches: Sequence[LayerCache], geometry: Geometry
) -> dict[str, Graph]:
    """The functions as the manifest describes them."""
    return {
        name: Graph(
            file=file,
            inputs=graph_inputs(caches, tokens),
            outputs=graph_outputs(config.vocab_size),
            states=graph_states(caches),
        )
        for name, tokens in function_lengths(geometry).items()
    }


def graph_inputs(caches: Sequence[LayerCache], tokens: int) -> tuple[TensorSpec, ...]:
    """What a function takes, states not among them."""
    masks = []
    for kind in used_kinds(caches):
        slots = next(cache.slots for cache in caches if cache.kind.value == kind)
        # The old ring and the chunk behind it, or every row of the context with the trash.
        seen = slots + (tokens if kind == AttentionKind.LOCAL.value else TRASH)
        masks += [
            TensorSpec(f"{kind}_slots", "int32", (tokens,)),
            TensorSpec(f"{kind}_mask", "float16", (tokens, seen)),
        ]
    return (
        TensorSpec("tokens", "int32", (tokens,)),
        TensorSpec("positions", "int32", (tokens,)),
        TensorSpec("last", "int32", (1,)),
        *masks,
    )


def graph_outputs(vocab_size: int) -> tuple[TensorSpec, ...]:
    return (TensorSpec("logits", "float16", (1, vocab_size)),)


def graph_states(caches: Sequence[LayerCache]) -> tuple[TensorSpec, ...]:
    """One state per kind of attention: keys and values of its layers, one behind the other."""
    return tuple(
        TensorSpec(f"{kind}_cache", "float16", _state_shape(caches, kind))
        for kind in used_kinds(caches)
    )


def first_row(caches: Sequence[LayerCache], index: int) -> int:
    """Where in its kind's state a layer's keys begin; its values follow them."""
    cache = caches[index]
    return 2 * cache.kv_heads * sum(c.kind is cache.kind for c in caches[:index])


def used_kinds(caches: Sequence[LayerCache]) -> tuple[str, ...]:
    """Kinds of attention that the layers have; each has one state."""
    return tuple(kind.value for kind in AttentionKind if any(c.kind is kind for c in caches))


def headroom_factor(max_abs: float) -> float:
    """A power of two that brings the largest residual below 2^14, a quarter of float16's range.

    Norms don't see it: they divide by the mean square. So embedding and branches may carry it.
    """
    factor = 1.0
    while max_abs * factor > 2**14:
        factor /= 2
    return factor


def _state_shape(caches: Sequence[LayerCache], kind: str) -> tuple[int, int, int]:
    alike = [cache for cache in caches if cache.kind.value == kind]
    first = alike[0]
    return (2 * first.kv_heads * len(alike), first.slots + TRASH, first.head_dim)
