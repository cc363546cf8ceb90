"""Converts a GemmaConfig to a `config.json`: the inverse of `config_from_hf`."""

import math
from collections.abc import Mapping
from typing import Any

from gemma_export.model.config import GemmaConfig
from gemma_export.model.families import FAMILIES
from gemma_export.model.hf_config import config_from_hf
from gemma_runtime.errors import TargetError
from gemma_runtime.manifest import AttentionKind, Rope

_KINDS = {AttentionKind.LOCAL: "sliding_attention", AttentionKind.GLOBAL: "full_attention"}


def hf_config(config: GemmaConfig, quantization: Mapping[str, Any] | None) -> dict[str, Any]:
    """The content of `config.json`, with this `quantization_config`.

    Raises TargetError if it can't hold the config.
    """
    family = FAMILIES[config.family]
    fields: dict[str, Any] = {
        "architectures": [family.classes[0]],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": len(config.kinds),
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "layer_types": [_KINDS[kind] for kind in config.kinds],
        "sliding_window": config.sliding_window,
        "max_position_embeddings": config.max_position,
        "query_pre_attn_scalar": _whole(config.query_scale**-2),
        "rms_norm_eps": config.rms_norm_eps,
        "attn_logit_softcapping": config.attn_softcap,
        "final_logit_softcapping": config.final_softcap,
        "hidden_act": "gelu_pytorch_tanh",  # Gemma 1's name for it
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_token,
        "eos_token_id": list(config.eos_tokens) or None,
        "pad_token_id": 0,
        **(_unequal_layers(config) if config.irregular else _ropes(config)),
    }
    fields = {name: value for name, value in fields.items() if name not in family.without}
    fields["dtype"] = _dtype(config, fields)
    _check(config, fields)
    return fields | ({"quantization_config": quantization} if quantization else {})


def _whole(value: float) -> int | float:
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-9) else value


def _ropes(config: GemmaConfig) -> dict[str, Any]:
    """The flat fields, which transformers 4, 5 and vLLM read."""
    rope = config.ropes[AttentionKind.GLOBAL]
    scaling = {"rope_type": "linear", "factor": rope.factor} if rope.factor != 1 else None
    fields: dict[str, Any] = {"rope_theta": rope.base, "rope_scaling": scaling}
    if FAMILIES[config.family].local_rope_base is not None:
        fields["rope_local_base_freq"] = config.ropes[AttentionKind.LOCAL].base
    return fields


def _unequal_layers(config: GemmaConfig) -> dict[str, Any]:
    """Gemma 4's fields, as its checkpoints have them."""
    return {
        "global_head_dim": config.global_head_dim or config.head_dim,
        "num_global_key_value_heads": config.global_kv_heads,
        "attention_k_eq_v": config.key_is_value,
        "num_kv_shared_layers": config.shared_layers,
        "use_double_wide_mlp": config.shared_intermediate_size is not None,
        "hidden_size_per_layer_input": config.per_layer,
        "vocab_size_per_layer_input": config.vocab_size,
        "enable_moe_block": False,
        "rope_parameters": {_KINDS[kind]: _rope(rope) for kind, rope in config.ropes.items()},
    }


def _rope(rope: Rope) -> dict[str, Any]:
    if rope.rotated == 1 and rope.factor == 1:
        return {"rope_type": "default", "rope_theta": rope.base}
    if rope.rotated == 1:
        return {"rope_type": "linear", "rope_theta": rope.base, "factor": rope.factor}
    fields: dict[str, Any] = {"rope_type": "proportional", "rope_theta": rope.base}
    if rope.factor != 1:
        fields["factor"] = rope.factor
    return {**fields, "partial_rotary_factor": rope.rotated}


def _dtype(config: GemmaConfig, fields: Mapping[str, Any]) -> str:
    """The dtype whose rounding gives the embedding scale."""
    as_bfloat16 = config_from_hf({**fields, "dtype": "bfloat16"})
    return "bfloat16" if as_bfloat16.embed_scale == config.embed_scale else "float32"


def _check(config: GemmaConfig, fields: Mapping[str, Any]) -> None:
    read = config_from_hf(fields)
    for name in GemmaConfig.__dataclass_fields__:
        found, expected = getattr(read, name), getattr(config, name)
        if found != expected:
            raise TargetError(
                f"hf can't store {name} {expected!r:.60}: transformers would use {found!r:.60}; "
                "choose another target"
            )
