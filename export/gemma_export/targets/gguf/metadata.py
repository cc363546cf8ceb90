"""Converts a GemmaConfig to GGUF metadata: the inverse of `checkpoint/gguf_config`.

Source: llama.cpp `src/models/gemma.cpp`, `gemma2.cpp`, `gemma3.cpp` and its converter,
`conversion/gemma.py`.
For Gemma 4 see also `layers`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from gemma_export.checkpoint.generation import LLAMA_SAMPLING
from gemma_export.checkpoint.gguf_config import TOKENS
from gemma_export.model.config import GemmaConfig, LayerSpec
from gemma_export.model.families import FAMILIES
from gemma_export.targets.gguf.layers import layer_metadata
from gemma_runtime.errors import TargetError
from gemma_runtime.formats.gguf import Value
from gemma_runtime.manifest import AttentionKind, Rope, SamplingDefaults


def model_metadata(id: str, config: GemmaConfig) -> dict[str, Value]:
    """The `general.*` and architecture keys. Raises TargetError if GGUF has no key for a value."""
    config = _written_as(config)
    _check_scale(config)
    _check_head(config)
    local = next((layer.rope for layer in config.layers if layer.window), None)
    rope = config.ropes[AttentionKind.GLOBAL]
    fields: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "block_count": len(config.kinds),
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope.base,
    }
    if config.sliding_window:
        fields["attention.sliding_window"] = config.sliding_window
    if local is not None:
        fields |= _local_rope(config, local)
    if rope.factor != 1:
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    caps = {"attn": config.attn_softcap, "final": config.final_softcap}
    fields |= {f"{part}_logit_softcapping": cap for part, cap in caps.items() if cap}
    fields |= (
        layer_metadata(config) if FAMILIES[config.family].gguf.unlike_layers else _pattern(config)
    )
    own = {f"{config.family}.{key}": value for key, value in fields.items()}
    general: dict[str, Value] = {
        "general.architecture": config.family,
        "general.type": "model",
        "general.name": id,
        "general.quantization_version": 2,
    }
    return general | own


def generation_metadata(
    stop_tokens: Sequence[int], sampling: SamplingDefaults | None, own: Mapping[str, Value]
) -> dict[str, Value]:
    """The `general.sampling.*` keys, and a key for a stop token that the vocabulary's keys lack."""
    keys: dict[str, Value] = {}
    if sampling is not None:
        keys = {
            f"general.sampling.{name}": getattr(sampling, field)
            for name, field in LLAMA_SAMPLING.items()
        }
    named = {own.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    others = [token for token in stop_tokens if token not in named]
    if others and "tokenizer.ggml.eom_token_id" not in own and TOKENS in own:
        keys["tokenizer.ggml.eom_token_id"] = others[-1]  # llama.cpp ends at it too
    return keys


def _written_as(config: GemmaConfig) -> GemmaConfig:
    """The config as one of the family that llama.cpp computes it as, usually its own."""
    name, title = FAMILIES[config.family].gguf.stand_in, FAMILIES[config.family].title
    if name is None:
        return config
    other = FAMILIES[name]
    traits = {
        "layers with a window": any(layer.window for layer in config.layers),
        "softcaps": bool(config.attn_softcap or config.final_softcap),
    }
    if found := " and ".join(trait for trait, is_there in traits.items() if is_there):
        raise TargetError(
            f"gguf can't store a {title} with {found}: llama.cpp has no architecture for it, and "
            f"that of {other.title} has none; choose another target"
        )
    return replace(config, family=name, sliding_window=0, mlp_norm=other.mlp_norm)


def _check_scale(config: GemmaConfig) -> None:
    """GGUF has no key for query_pre_attn_scalar; llama.cpp derives it from the number of layers."""
    if not FAMILIES[config.family].scaled_queries:
        return
    by_width = len(config.kinds) == FAMILIES[config.family].gguf.width_scaled_layers
    scalar = config.hidden_size // config.heads if by_width else config.head_dim
    if not math.isclose(config.query_scale, scalar**-0.5, rel_tol=1e-6):
        raise TargetError(
            f"gguf can't store query_pre_attn_scalar {config.query_scale**-2:.4g}: llama.cpp uses "
            f"{scalar} for this {config.family}; choose another target"
        )


def _check_head(config: GemmaConfig) -> None:
    if not config.tied and not FAMILIES[config.family].gguf.reads_head:
        raise TargetError(
            f"gguf can't store a head apart from the embedding table for {config.family}: "
            "llama.cpp doesn't read one; choose another target"
        )


def _local_rope(config: GemmaConfig, local: Rope) -> dict[str, Value]:
    """llama.cpp uses one rope for all layers, or gives local layers their own base and factor 1."""
    alike = FAMILIES[config.family].local_rope_base is None
    if local != (config.ropes[AttentionKind.GLOBAL] if alike else Rope(local.base, 1.0)):
        part = f" in {local.rotated:g} of the head" if local.rotated != 1 else ""
        raise TargetError(
            f"gguf can't store rope base {local.base:g} and factor {local.factor:g}{part} of local "
            f"layers for {config.family}; choose another target"
        )
    return {} if alike else {"rope.freq_base_swa": local.base}


def _pattern(config: GemmaConfig) -> dict[str, Value]:
    if _is_periodic(config.layers, FAMILIES[config.family].global_every):
        return {}
    flags = [layer.kind is AttentionKind.LOCAL for layer in config.layers]
    return {"attention.sliding_window_pattern": np.array(flags)}


def _is_periodic(layers: Sequence[LayerSpec], period: int) -> bool:
    return all(
        (layer.kind is AttentionKind.LOCAL) == (layer.index % period < period - 1)
        for layer in layers
    )
