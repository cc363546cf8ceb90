"""Converts GGUF metadata to the fields of `config.json`, adding what llama.cpp hard-codes.

Source: llama.cpp `src/models/gemma.cpp`, `gemma2.cpp`, `gemma3.cpp` and its converter,
`conversion/gemma.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gemma_export.checkpoint.gguf_ollama import translate_ollama
from gemma_export.model.config import GemmaConfig
from gemma_export.model.families import FAMILIES, Family, GgufFamily
from gemma_export.model.hf_config import config_from_hf
from gemma_runtime.errors import ConfigError
from gemma_runtime.formats.gguf import GgufHeader, Value

TOKENS = "tokenizer.ggml.tokens"
_TABLE = "token_embd.weight"
_QUERIES = "blk.0.attn_q.weight"
_END_OF_TURN = "<end_of_turn>"
_PATTERN = "attention.sliding_window_pattern"
_OPTIONAL = {
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attention.sliding_window": "sliding_window",
}
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def config_from_gguf(header: GgufHeader) -> GemmaConfig:
    """Convert the metadata and read it like a `config.json`. Raises ConfigError."""
    metadata = translate_ollama(header.metadata)
    name = metadata.get("general.architecture")
    known = {
        family.name: family.gguf
        for family in FAMILIES.values()
        if family.gguf is not None and family.gguf.stand_in is None
    }
    if not isinstance(name, str) or name not in known:
        raise ConfigError(
            f"architecture {name!r:.40} is not supported; expected {' or '.join(known)}"
        )
    family = FAMILIES[name]
    fields = _Fields(family, known[name], _scalars(metadata, name))
    layers = fields.count("block_count")
    if layers > len(header.tensors):  # before anything is allocated per layer
        raise ConfigError(f"{name}.block_count is {layers}, more than there are tensors")
    rows = _vocabulary(header)
    return config_from_hf(
        {
            "model_type": family.model_type,
            "dtype": "bfloat16",  # what Gemma was trained in, whatever the file stores
            "vocab_size": rows,
            "num_hidden_layers": layers,
            **_sizes(fields, layers, header),
            **_attention(fields),
            **_layer_types(metadata.get(f"{name}.{_PATTERN}"), layers),
            **_tokens(metadata, rows),
        }
    )


def _scalars(metadata: Mapping[str, Value], family: str) -> dict[str, int | float | str]:
    """The family's fields by key. In Gemma all layers share them, so none may be a list."""
    prefix = f"{family}."
    scalars: dict[str, int | float | str] = {}
    for key, value in metadata.items():
        if not key.startswith(prefix) or key == prefix + _PATTERN:
            continue
        if isinstance(value, list | np.ndarray):
            raise ConfigError(f"{key} is a list, expected one value for all layers")
        scalars[key.removeprefix(prefix)] = value
    return scalars


@dataclass(frozen=True, slots=True)
class _Fields:
    family: Family
    gguf: GgufFamily
    values: Mapping[str, int | float | str]

    def require(self, key: str) -> int | float | str:
        if key not in self.values:
            raise ConfigError(
                f"GGUF metadata has no {self.family.name}.{key}; convert the model again"
            )
        return self.values[key]

    def count(self, key: str) -> int:
        value = self.require(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"{self.family.name}.{key} is {value!r:.40}, expected a whole number above 0"
            )
        return value


def _vocabulary(header: GgufHeader) -> int:
    """The number of rows of the table; at least the number of tokens."""
    table = header.tensors.get(_TABLE)
    if table is None:
        raise ConfigError(f"tensor {_TABLE} is missing; expected a whole text model")
    rows, tokens = table.shape[0], header.metadata.get(TOKENS)
    if isinstance(tokens, list) and len(tokens) > rows:
        raise ConfigError(f"{_TABLE} has {rows} rows for {len(tokens)} tokens")
    return rows


def _sizes(fields: _Fields, layers: int, header: GgufHeader) -> dict[str, object]:
    width, heads = fields.count("embedding_length"), fields.count("attention.head_count")
    if "attention.key_length" in fields.values:
        head_dim = fields.count("attention.key_length")
    else:  # Ollama's multimodal files have no such key
        queries = header.tensors.get(_QUERIES)
        head_dim = (queries.shape[0] if queries else width) // heads
    return {
        "hidden_size": width,
        "intermediate_size": fields.count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.count("attention.head_count_kv"),
        "head_dim": head_dim,
        # GGUF has no field for it: llama.cpp goes by the number of layers.
        "query_pre_attn_scalar": width // heads
        if layers == fields.gguf.width_scaled_layers
        else head_dim,
        "rms_norm_eps": fields.require("attention.layer_norm_rms_epsilon"),
    }


def _attention(fields: _Fields) -> dict[str, object]:
    for key in fields.gguf.required:
        fields.require(key)
    values = fields.values
    config: dict[str, object] = {hf: values[key] for key, hf in _OPTIONAL.items() if key in values}
    config |= {cap: values[cap] or None for cap in _SOFTCAPS if cap in values}  # 0 is off
    # A factor without a type is linear, as the older name of the field says.
    factor = values.get("rope.scaling.factor", values.get("rope.scale_linear"))
    kind = values.get("rope.scaling.type", "linear" if factor else "none")
    if kind != "none":
        config["rope_scaling"] = {"rope_type": kind, "factor": factor or 1.0}
    return config


def _layer_types(pattern: Value | None, layers: int) -> dict[str, list[str]]:
    """`layer_types` from the file's period or list; empty if it has neither."""
    if pattern is None:
        return {}
    if isinstance(pattern, np.ndarray) and len(pattern) == layers:
        local = [bool(one) for one in pattern]
    elif isinstance(pattern, int) and pattern > 0:
        local = [index % pattern < pattern - 1 for index in range(layers)]
    else:
        raise ConfigError(f"{_PATTERN} is {pattern!r:.40}, expected a period or one flag per layer")
    return {"layer_types": ["sliding_attention" if one else "full_attention" for one in local]}


def _tokens(metadata: Mapping[str, Value], rows: int) -> dict[str, object]:
    """The bos and stop tokens; <end_of_turn> is a stop token if the vocabulary has it."""
    ends = [_token(metadata, "eos", rows), _token(metadata, "eot", rows)]
    tokens = metadata.get(TOKENS)
    if isinstance(tokens, list) and _END_OF_TURN in tokens:
        ends.append(tokens.index(_END_OF_TURN))
    config: dict[str, object] = {}
    if stops := [end for end in dict.fromkeys(ends) if end is not None]:
        config["eos_token_id"] = stops
    if (bos := _token(metadata, "bos", rows)) is not None:
        config["bos_token_id"] = bos
    return config


def _token(metadata: Mapping[str, Value], name: str, rows: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is not None and (not isinstance(value, int) or not 0 <= value < rows):
        raise ConfigError(f"{key} is {value!r:.40}, expected a token below {rows}")
    return value
