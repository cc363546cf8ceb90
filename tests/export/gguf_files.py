"""Writes small GGUF files in the form that llama.cpp's converter produces."""

import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TensorNameMap, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray

from gemma_export.model.config import HEAD, GemmaConfig
from gemma_export.model.hf_config import config_from_hf
from gemma_export.model.official import Json

Stored = tuple[NDArray[np.generic], GGMLQuantizationType]
Metadata = dict[str, int | float | str | Sequence[int | float | str | bool]]

_TYPE_NAMES = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K"
TYPES = tuple(GGMLQuantizationType[name] for name in _TYPE_NAMES.split())
F32 = GGMLQuantizationType.F32
_ARCHITECTURES = {
    "gemma": MODEL_ARCH.GEMMA,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "gemma4_text": MODEL_ARCH.GEMMA4,
    "gemma4_unified_text": MODEL_ARCH.GEMMA4,
}
_SHARED = {
    "vocab_size": 64,
    "hidden_size": 256,  # K-quants come in blocks of 256
    "intermediate_size": 512,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "query_pre_attn_scalar": 128,
    "sliding_window": 16,
    "eos_token_id": [1, 5],
}
GEMMA1: Json = {**_SHARED, "model_type": "gemma", "num_hidden_layers": 2}
GEMMA2: Json = {**_SHARED, "model_type": "gemma2", "num_hidden_layers": 2}
GEMMA3: Json = {**_SHARED, "model_type": "gemma3_text", "num_hidden_layers": 7}
_L, _G = "sliding_attention", "full_attention"
GEMMA4: Json = {  # like E2B
    **_SHARED,
    "model_type": "gemma4_text",
    "num_hidden_layers": 5,
    "layer_types": [_L, _L, _G, _L, _G],
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "global_head_dim": 256,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 64,
    "final_logit_softcapping": 30.0,
}
GEMMA4_DENSE: Json = {  # like 12b and 31b
    **_SHARED,
    "model_type": "gemma4_text",
    "num_hidden_layers": 4,
    "layer_types": [_L, _G, _L, _G],
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "global_head_dim": 256,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
}


def llama_metadata(hf: Json) -> Metadata:
    """The metadata that the converter writes for a config.json, with a vocabulary of 64 tokens."""
    config = config_from_hf(hf)
    family = config.family
    fields: Metadata = {
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "block_count": len(config.kinds),
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }
    if config.sliding_window:
        fields["attention.sliding_window"] = config.sliding_window
    if family == "gemma2":
        fields |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if family in ("gemma3", "gemma4"):
        fields["rope.freq_base"] = 1_000_000.0
    if family == "gemma4":
        fields |= _gemma4_fields(config)
    if scaling := hf.get("rope_scaling"):
        fields |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": 8.0}
    own: Metadata = {f"{family}.{key}": value for key, value in fields.items()}
    return {"general.architecture": family, **own, **vocabulary(hf["eos_token_id"][-1])}


def _gemma4_fields(config: GemmaConfig) -> Metadata:
    layers = config.layers
    fields: Metadata = {
        "attention.key_length_swa": config.head_dim,
        "attention.value_length_swa": config.head_dim,
        "attention.key_length": config.global_head_dim or config.head_dim,
        "attention.value_length": config.global_head_dim or config.head_dim,
        "attention.sliding_window_pattern": [layer.window is not None for layer in layers],
        "attention.shared_kv_layers": config.shared_layers,
        "embedding_length_per_layer_input": config.per_layer,
        "rope.dimension_count": config.global_head_dim or config.head_dim,
        "rope.dimension_count_swa": config.head_dim,
        "final_logit_softcapping": 30.0,
    }
    if config.shared_intermediate_size:
        fields["feed_forward_length"] = [layer.ffn for layer in layers]
    if config.global_kv_heads:
        fields["attention.head_count_kv"] = [layer.kv_heads for layer in layers]
    return fields


def vocabulary(end_of_turn: int) -> Metadata:
    """A few pieces of each type: control, user-defined, bytes, letters and their merges."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces += [f"<unused{i}>" for i in range(end_of_turn - 4)] + ["<end_of_turn>"]
    control = len(pieces)
    pieces += ["\n", "\n\n", "  ", "   ", "    ", "<0x00>", "<0x21>"]
    pieces += ["an", "▁an", "ana", "ban", "▁", "a", "n", "b", "s"]
    types = [3] * control + [4] * 5 + [6] * 2 + [1] * 9
    scores = [-1000.0] * (control + 5) + [0.0] * 2 + [-float(i) for i in range(9)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
    }


def random_tensors(hf: Json, type: GGMLQuantizationType = F32) -> dict[str, Stored]:
    """All tensors under llama.cpp's names: matrices in `type`, what norms multiply by as it is."""
    generator = np.random.default_rng(5)
    tensors: dict[str, Stored] = {}
    config = config_from_hf(hf)
    for name, shape in config.tensor_shapes().items():
        values = generator.standard_normal(shape, np.float32) * np.float32(0.1)
        if "global_head_dim" in hf and name.endswith(("q_norm.weight", "k_norm.weight")):
            values = values * shape[0] ** -0.25 - (1 - shape[0] ** -0.25)  # unscaled attention
        stored = (1 + values, F32) if len(shape) == 1 else (encode(values, type), type)
        tensors[llama_name(hf, config.hf_name(name))] = stored
    if "global_head_dim" in hf:
        tensors["rope_freqs.weight"] = (rope_factors(hf["global_head_dim"]), F32)
    return tensors


def rope_factors(head_dim: int) -> NDArray[np.float32]:
    """What the converter writes for a quarter of the pairs that turn."""
    pairs, turning = head_dim // 2, head_dim // 8
    return np.array([1.0] * turning + [1e30] * (pairs - turning), np.float32)


def llama_name(hf: Json, name: str) -> str:
    """llama.cpp's name for a Hugging Face tensor, from the table in the gguf package."""
    if name == HEAD:  # not in the table of every architecture
        return "output.weight"
    names = _names(_ARCHITECTURES[hf["model_type"]], hf["num_hidden_layers"])
    weight = name if name.endswith(".weight") else f"{name}.weight"
    llama = names.get_name(weight, try_suffixes=(".weight",))
    assert llama is not None
    return llama


@cache
def _names(architecture: MODEL_ARCH, layers: int) -> TensorNameMap:
    return get_tensor_name_map(architecture, layers)


def encode(values: NDArray[np.float32], type: GGMLQuantizationType) -> NDArray[np.generic]:
    """Quantize the values. For K-quants, which gguf can't write, make random blocks instead."""
    if not type.name.endswith("_K"):
        return quantize(values, type)
    block, block_bytes = GGML_QUANT_SIZES[type]
    blocks = values.size // block
    data = np.random.default_rng(6).integers(0, 256, (blocks, block_bytes), np.uint8)
    scale = np.full((blocks, 1), 0.01, np.float16).view(np.uint8)
    if (
        type is GGMLQuantizationType.Q6_K
    ):  # scale at the end; in other types, scale and minimum first
        data[:, -2:] = scale
    else:
        data[:, 0:2] = data[:, 2:4] = scale
    return data.reshape(len(values), -1)


def write_gguf(path: Path, metadata: Metadata, tensors: Mapping[str, Stored]) -> Path:
    writer = GGUFWriter(path, str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if key != "general.architecture":  # GGUFWriter has already written it
            _add(writer, key, value)
    for name, (data, type) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny(
    path: Path,
    hf: Json = GEMMA3,
    type: GGMLQuantizationType = F32,
    metadata: Metadata | None = None,
    tensors: dict[str, Stored | None] | None = None,
) -> Path:
    """Write a valid file with some fields and tensors overridden; None leaves a tensor out."""
    changed = {**random_tensors(hf, type), **(tensors or {})}
    kept = {name: stored for name, stored in changed.items() if stored is not None}
    return write_gguf(path / "model.gguf", {**llama_metadata(hf), **(metadata or {})}, kept)


def peak_of(work: Callable[[], object]) -> int:
    """Peak bytes of Python allocations during `work`."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _add(
    writer: GGUFWriter, key: str, value: int | float | str | Sequence[int | float | str | bool]
) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)
