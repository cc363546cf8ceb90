"""Converts the GGUF metadata of a family whose layers differ, Gemma 4, to fields of `config.json`.

Source: llama.cpp `src/models/gemma4.cpp` and `Gemma4Model` of its `conversion/gemma.py`.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gemma_export.checkpoint.gguf_fields import GLOBAL, LOCAL, Fields
from gemma_export.model.config import GemmaConfig
from gemma_export.model.families import FAMILIES
from gemma_runtime.errors import ConfigError
from gemma_runtime.formats.gguf import Value

ROPE_FACTORS = "rope_freqs.weight"
STILL = 1e30  # the factor of a pair that doesn't turn: it divides the angle
# llama.cpp reads each pair of keys; in every Gemma 4 the two are equal.
_EQUAL = {
    "attention.value_length": "attention.key_length",
    "attention.value_length_swa": "attention.key_length_swa",
    "rope.dimension_count": "attention.key_length",
    "rope.dimension_count_swa": "attention.key_length_swa",
}
_SHARED = "attention.shared_kv_layers"
_OWN = ("attn_k", "attn_v", "attn_k_norm")  # tensors of layers with a cache of their own


def layer_fields(
    fields: Fields, layers: int, tensors: Collection[str], factors: NDArray[np.float32] | None
) -> dict[str, object]:
    """Head sizes, ropes, and what only some layers have. Raises ConfigError.

    `tensors` are the names in the file, `factors` those of global layers' rope: (D / 2,).
    """
    for key, other in _EQUAL.items():
        if key in fields.values and fields.values[key] != fields.require(other):
            _refuse(fields, key, f"{other}, {fields.values[other]!r:.40}")
    types, shared = _types(fields, layers), _shared_layers(fields, layers)
    kv_heads = _kv_heads(fields, types)
    sizes = {LOCAL: fields.count("attention.key_length_swa")}
    sizes[GLOBAL] = fields.count("attention.key_length")
    own = [index for index, kind in enumerate(types[: layers - shared]) if kind == GLOBAL]
    return {
        "layer_types": types,
        "head_dim": sizes[LOCAL],
        "num_key_value_heads": kv_heads[0],
        "per_layer_config": {
            str(index): {"head_dim": sizes[kind], "num_key_value_heads": kv_heads[index]}
            for index, kind in enumerate(types)
        },
        "attention_k_eq_v": not any(f"blk.{index}.attn_v.weight" in tensors for index in own),
        "num_kv_shared_layers": shared,
        **_ffn(fields, layers, shared),
        "hidden_size_per_layer_input": fields.count("embedding_length_per_layer_input", 0),
        "enable_moe_block": bool(fields.values.get("expert_count")),
        "rope_parameters": _ropes(fields, sizes[GLOBAL], factors),
    }


def _shared_layers(fields: Fields, layers: int) -> int:
    """How many layers at the end read the caches of earlier ones."""
    if _SHARED not in fields.values:
        return 0
    count = fields.count(_SHARED, 0)
    if count >= layers:
        _refuse(fields, _SHARED, f"less than {layers}, the number of layers")
    return count


def unused_tensors(config: GemmaConfig) -> set[str]:
    """Names of tensors that files may have, though they are no weights of the decoder.

    llama.cpp's converter keeps the keys and values of layers that read other layers' caches.
    """
    if not FAMILIES[config.family].gguf.unlike_layers:
        return set()
    readers = range(config.owners, len(config.kinds))
    return {ROPE_FACTORS, *(f"blk.{index}.{name}.weight" for index in readers for name in _OWN)}


def _types(fields: Fields, layers: int) -> list[str]:
    types = fields.layer_types(layers)
    assert types is not None  # the family requires the pattern
    if types[-1] != GLOBAL:
        raise ConfigError(
            f"the last layer of this {fields.family.title} has a window, expected a global one; "
            "convert the model again"
        )
    return types


def _kv_heads(fields: Fields, types: Sequence[str]) -> list[int]:
    key = "attention.head_count_kv"
    heads = fields.each(key, len(types))
    if len(set(zip(heads, types, strict=True))) > len(set(types)):
        _refuse(fields, key, "one number for all layers of a kind")
    return heads


def _ffn(fields: Fields, layers: int, shared: int) -> Mapping[str, object]:
    key = "feed_forward_length"
    sizes = fields.each(key, layers)
    first, rest = sizes[0], set(sizes[layers - shared :])
    if set(sizes[: layers - shared]) != {first} or not (
        len(rest) <= 1 and rest <= {first, 2 * first}
    ):
        _refuse(fields, key, "one number, doubled in all layers that read others' caches, or none")
    return {"intermediate_size": first, "use_double_wide_mlp": rest == {2 * first}}


def _ropes(
    fields: Fields, head_dim: int, factors: NDArray[np.float32] | None
) -> Mapping[str, object]:
    kind, factor = rope_scaling(fields)
    return {
        LOCAL: {
            "rope_type": "default",
            "rope_theta": fields.values.get("rope.freq_base_swa", fields.family.local_rope_base),
        },
        GLOBAL: {
            "rope_type": "proportional" if kind in ("none", "linear") else kind,
            "rope_theta": fields.require("rope.freq_base"),
            "factor": 1.0 if kind == "none" else factor,
            "partial_rotary_factor": _turning(head_dim, factors),
        },
    }


def rope_scaling(fields: Fields) -> tuple[Value, Value]:
    """Type and factor. A factor without a type is linear, as the older name of the field says."""
    factor = fields.values.get("rope.scaling.factor", fields.values.get("rope.scale_linear"))
    return fields.values.get("rope.scaling.type", "linear" if factor else "none"), factor or 1.0


def _turning(head_dim: int, factors: NDArray[np.float32] | None) -> float:
    """The share of rope's pairs that turn: they come first, and their factor is 1."""
    if factors is None:
        raise ConfigError(f"tensor {ROPE_FACTORS} is missing; convert the model again")
    count = int((factors == 1).sum())
    expected = np.where(np.arange(head_dim // 2) < count, 1, STILL).astype(np.float32)
    if not np.array_equal(factors, expected):
        raise ConfigError(
            f"{ROPE_FACTORS} has {len(factors)} factors, expected {head_dim // 2}: first 1, and "
            f"then {STILL:g}; convert the model again"
        )
    return 2 * count / head_dim


def _refuse(fields: Fields, key: str, expected: str) -> None:
    found = fields.values[key]
    shown = found.tolist() if isinstance(found, np.ndarray) else found
    raise ConfigError(f"{fields.family.name}.{key} is {shown!r:.60}, expected {expected}")
