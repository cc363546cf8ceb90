"""Converts GGUF metadata to the fields of `config.json`, adding what llama.cpp hard-codes.

Source: llama.cpp `src/models/gemma.cpp`, `gemma2.cpp`, `gemma3.cpp` and its converter,
`conversion/gemma.py`.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from gemma_export.checkpoint.gguf_fields import Fields, read_fields
from gemma_export.checkpoint.gguf_layers import layer_fields, rope_scaling
from gemma_export.checkpoint.gguf_ollama import translate_ollama
from gemma_export.model.config import GemmaConfig
from gemma_export.model.families import FAMILIES
from gemma_export.model.hf_config import config_from_hf
from gemma_runtime.errors import ConfigError
from gemma_runtime.formats.gguf import GgufHeader, Value

TOKENS = "tokenizer.ggml.tokens"
_TABLE = "token_embd.weight"
_QUERIES = "blk.0.attn_q.weight"
_ENDS = ("<end_of_turn>", "<turn|>", "<|tool_response>")  # llama.cpp knows them by their names
_OPTIONAL = {
    "context_length": "max_position_embeddings",
    "attention.sliding_window": "sliding_window",
}
_ROPE_BASES = {"rope.freq_base": "rope_theta", "rope.freq_base_swa": "rope_local_base_freq"}
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def config_from_gguf(
    header: GgufHeader, rope_factors: NDArray[np.float32] | None = None
) -> GemmaConfig:
    """Convert the metadata and read it like a `config.json`. Raises ConfigError.

    `rope_factors` is the tensor of that name, where the file has one: (D / 2,).
    """
    metadata = translate_ollama(header.metadata)
    name = metadata.get("general.architecture")
    known = [family.name for family in FAMILIES.values() if family.gguf.stand_in is None]
    if not isinstance(name, str) or name not in known:
        raise ConfigError(
            f"architecture {name!r:.40} is not supported; expected {' or '.join(known)}"
        )
    fields = read_fields(metadata, FAMILIES[name])
    layers = fields.count("block_count")
    if layers > len(header.tensors):  # before anything is allocated per layer
        raise ConfigError(f"{name}.block_count is {layers}, more than there are tensors")
    rows = _vocabulary(header)
    for key in fields.family.gguf.required:
        fields.require(key)
    return config_from_hf(
        {
            "model_type": fields.family.model_type,
            "dtype": "bfloat16",  # what Gemma was trained in, whatever the file stores
            "vocab_size": rows,
            "vocab_size_per_layer_input": rows,
            "num_hidden_layers": layers,
            "hidden_size": fields.count("embedding_length"),
            "num_attention_heads": fields.count("attention.head_count"),
            "rms_norm_eps": fields.require("attention.layer_norm_rms_epsilon"),
            **{hf: fields.values[key] for key, hf in _OPTIONAL.items() if key in fields.values},
            **{cap: fields.values[cap] or None for cap in _SOFTCAPS if cap in fields.values},
            **(
                layer_fields(fields, layers, header.tensors, rope_factors)
                if fields.family.gguf.unlike_layers
                else _sizes(fields, layers, header)
            ),
            **_tokens(metadata, rows),
        }
    )


def _vocabulary(header: GgufHeader) -> int:
    """The number of rows of the table; at least the number of tokens."""
    table = header.tensors.get(_TABLE)
    if table is None:
        raise ConfigError(f"tensor {_TABLE} is missing; expected a whole text model")
    rows, tokens = table.shape[0], header.metadata.get(TOKENS)
    if isinstance(tokens, list) and len(tokens) > rows:
        raise ConfigError(f"{_TABLE} has {rows} rows for {len(tokens)} tokens")
    return rows


def _sizes(fields: Fields, layers: int, header: GgufHeader) -> dict[str, object]:
    """Sizes and ropes of a family whose layers are alike."""
    width, heads = fields.count("embedding_length"), fields.count("attention.head_count")
    if "attention.key_length" in fields.values:
        head_dim = fields.count("attention.key_length")
    else:  # Ollama's multimodal files have no such key
        queries = header.tensors.get(_QUERIES)
        head_dim = (queries.shape[0] if queries else width) // heads
    sizes: dict[str, object] = {
        "intermediate_size": fields.count("feed_forward_length"),
        "num_key_value_heads": fields.count("attention.head_count_kv"),
        "head_dim": head_dim,
        # GGUF has no field for it: llama.cpp goes by the number of layers.
        "query_pre_attn_scalar": width // heads
        if layers == fields.family.gguf.width_scaled_layers
        else head_dim,
    }
    sizes |= {hf: fields.values[key] for key, hf in _ROPE_BASES.items() if key in fields.values}
    kind, factor = rope_scaling(fields)
    if kind != "none":
        sizes["rope_scaling"] = {"rope_type": kind, "factor": factor}
    if (types := fields.layer_types(layers)) is not None:
        sizes["layer_types"] = types
    return sizes


def _tokens(metadata: Mapping[str, Value], rows: int) -> dict[str, object]:
    """The bos and stop tokens; the ends of turns are stop tokens if the vocabulary has them."""
    ends = [_token(metadata, name, rows) for name in ("eos", "eot", "eom")]
    tokens = metadata.get(TOKENS)
    if isinstance(tokens, list):
        ends += [tokens.index(piece) for piece in _ENDS if piece in tokens]
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
