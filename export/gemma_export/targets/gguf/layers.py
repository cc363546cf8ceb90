"""GGUF metadata of a family whose layers differ, Gemma 4: the inverse of `checkpoint/gguf_layers`.

llama.cpp fixes which caches the last layers read: the last two that layers own, the first of them
local. Source: llama.cpp `src/models/gemma4.cpp`, and `create_memory` in `src/llama-model.cpp`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemma_export.checkpoint.gguf_layers import STILL
from gemma_export.model.config import GemmaConfig
from gemma_export.model.families import FAMILIES
from gemma_runtime.errors import TargetError
from gemma_runtime.formats.gguf import Value
from gemma_runtime.manifest import AttentionKind


def layer_metadata(config: GemmaConfig) -> dict[str, Value]:
    """The keys without the architecture's prefix.

    Raises TargetError for layers that llama.cpp would compute differently, or not at all.
    """
    _check_sources(config)
    (local,) = {layer.head_dim for layer in config.layers if layer.window}
    (whole,) = {layer.head_dim for layer in config.layers if not layer.window}
    return {
        "feed_forward_length": _values([layer.ffn for layer in config.layers]),
        "attention.head_count_kv": _values([layer.kv_heads for layer in config.layers]),
        "attention.key_length": whole,
        "attention.value_length": whole,
        "attention.key_length_swa": local,
        "attention.value_length_swa": local,
        "attention.shared_kv_layers": config.shared_layers,
        "attention.sliding_window_pattern": np.array([bool(x.window) for x in config.layers]),
        "embedding_length_per_layer_input": config.per_layer,
        "rope.dimension_count": whole,
        "rope.dimension_count_swa": local,
    }


def rope_factors(config: GemmaConfig) -> NDArray[np.float32] | None:
    """What divides the angles of global layers: (D / 2,) 1 for pairs that turn, else STILL."""
    if not FAMILIES[config.family].gguf.unlike_layers:
        return None
    (half,) = {layer.head_dim // 2 for layer in config.layers if not layer.window}
    turning = int(config.ropes[AttentionKind.GLOBAL].rotated * 2 * half // 2)
    return np.where(np.arange(half) < turning, 1, STILL).astype(np.float32)


def _check_sources(config: GemmaConfig) -> None:
    kinds = {layer.kind for layer in config.layers}
    if kinds != set(AttentionKind):
        raise TargetError(
            f"gguf can't store a {config.family} whose layers are all {kinds.pop().value}: "
            "llama.cpp expects both kinds; choose another target"
        )
    last = config.last_owner
    for layer in config.layers[config.owners :]:
        expected = last - 1 if layer.window else last
        if layer.source != expected:
            raise TargetError(
                f"gguf can't store layer {layer.index}, which reads the cache of layer "
                f"{layer.source}: in llama.cpp it reads that of layer {expected}; choose another "
                "target"
            )


def _values(numbers: Sequence[int]) -> Value:
    """One number if it is the same for all layers, else the list of them."""
    return numbers[0] if len(set(numbers)) == 1 else np.array(numbers, np.int32)
