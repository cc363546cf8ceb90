"""GGUF checkpoints of Gemma 4: layers that differ, and a vocabulary with merges."""

import json
from pathlib import Path

import numpy as np
import pytest

from gemma_export.checkpoint.gguf import open_gguf
from gemma_export.checkpoint.gguf_tokenizer import rebuild_tokenizer
from gemma_export.model.config import is_gain
from gemma_export.model.hf_config import config_from_hf
from gemma_export.model.official import Json
from gemma_export.targets.gguf.vocabulary import make_vocabulary
from gemma_runtime.errors import CheckpointError, ConfigError
from gemma_runtime.formats.gguf import Value
from tests.export.gguf_files import (
    F32,
    GEMMA4,
    GEMMA4_DENSE,
    Metadata,
    Stored,
    llama_metadata,
    llama_name,
    random_tensors,
    rope_factors,
    write_gguf,
    write_tiny,
)
from tests.export.models import GEMMA4S, Tiny
from tests.runtime.conftest import gemma4_tokenizer

HERE = Path("model.gguf")
BOTH = pytest.mark.parametrize("hf", [GEMMA4, GEMMA4_DENSE], ids=["edge", "dense"])


@BOTH
def test_metadata_in_the_converter_s_form_give_the_config(tmp_path: Path, hf: Json) -> None:
    checkpoint = open_gguf(write_tiny(tmp_path, hf))
    assert checkpoint.config == config_from_hf(hf)
    assert checkpoint.notes == ()


@pytest.mark.parametrize("tiny", GEMMA4S, ids=lambda tiny: tiny.name)
def test_a_converted_transformers_model_has_its_original_weights(
    tmp_path: Path, tiny: Tiny
) -> None:
    """GGUF stores gains as the original does, and the decoder's gains are 1 less."""
    hf = tiny.config.to_dict() | {"eos_token_id": [1, 5]}
    weights = {name: weight.numpy() for name, weight in tiny.build().state_dict().items()}
    del weights["lm_head.weight"]
    tensors: dict[str, Stored] = {llama_name(hf, name): (w, F32) for name, w in weights.items()}
    tensors["rope_freqs.weight"] = (rope_factors(32), F32)
    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", llama_metadata(hf), tensors))
    assert checkpoint.config.tensor_shapes().keys() == weights.keys()
    for name, weight in weights.items():
        rows = checkpoint.rows(name, 0, len(weight)).numpy()
        assert np.array_equal(rows, weight - 1 if is_gain(name) else weight), name


def test_keys_and_values_of_layers_that_read_others_caches_are_left_out(tmp_path: Path) -> None:
    """llama.cpp's converter keeps them, as official folders do."""
    unused = {
        "blk.3.attn_k.weight": (np.ones((128, 256), "f4"), F32),
        "blk.3.attn_v.weight": (np.ones((128, 256), "f4"), F32),
        "blk.4.attn_k_norm.weight": (np.ones(256, "f4"), F32),
    }
    checkpoint = open_gguf(write_tiny(tmp_path, GEMMA4, tensors=dict(unused)))
    assert checkpoint.config == config_from_hf(GEMMA4)
    other = tmp_path / "owner"
    other.mkdir()
    path = write_tiny(other, GEMMA4, tensors={"blk.5.attn_k.weight": unused["blk.3.attn_k.weight"]})
    with pytest.raises(CheckpointError, match=r"layers\.5\.self_attn\.k_proj\.weight is not part"):
        open_gguf(path)


def test_a_global_rope_may_turn_another_share_of_its_pairs(tmp_path: Path) -> None:
    factors = np.array([1.0] * 64 + [1e30] * 64, np.float32)
    path = write_tiny(tmp_path, GEMMA4, tensors={"rope_freqs.weight": (factors, F32)})
    ropes = open_gguf(path).config.ropes.values()
    assert sorted(rope.rotated for rope in ropes) == [0.5, 1.0]


def test_ends_of_turns_are_stop_tokens(tmp_path: Path) -> None:
    pieces = llama_metadata(GEMMA4)["tokenizer.ggml.tokens"]
    assert isinstance(pieces, list)
    named = {"<end_of_turn>": "<turn|>", "<unused0>": "<|tool_response>"}
    tokens = [named.get(str(piece), str(piece)) for piece in pieces]
    path = write_tiny(tmp_path, GEMMA4, metadata={"tokenizer.ggml.tokens": tokens})
    assert open_gguf(path).config.eos_tokens == (1, 5, 4)


_FACTORS = rope_factors(256)
REFUSED: dict[str, tuple[Metadata, dict[str, Stored | None], str]] = {
    "heads": ({"gemma4.attention.head_count": [2] * 5}, {}, "head_count is a list"),
    "kv heads": (
        {"gemma4.attention.head_count_kv": [1, 2, 1, 1, 1]},
        {},
        r"head_count_kv is \[1, 2, 1, 1, 1\], expected one number for all layers of a kind",
    ),
    "short list": ({"gemma4.feed_forward_length": [512] * 4}, {}, "expected 5 whole numbers"),
    "zero": ({"gemma4.feed_forward_length": [512, 0, 512, 512, 512]}, {}, "expected 5 whole"),
    "ffn": ({"gemma4.feed_forward_length": [512] * 4 + [1024]}, {}, "doubled in all layers"),
    "all wide": ({"gemma4.feed_forward_length": 512}, {}, r"gate_proj\.weight has shape \(1024"),
    "shared": ({"gemma4.attention.shared_kv_layers": 5}, {}, "is 5, expected less than 5"),
    "no owner": (
        {
            "gemma4.attention.shared_kv_layers": 3,
            "gemma4.feed_forward_length": [512] * 2 + [1024] * 3,
        },
        {},
        "leaves a layer of each kind",
    ),
    "values": ({"gemma4.attention.value_length": 128}, {}, "expected attention.key_length, 256"),
    "partial": ({"gemma4.rope.dimension_count": 64}, {}, "expected attention.key_length, 256"),
    "experts": ({"gemma4.expert_count": 4}, {}, "no target computes a mixture of experts"),
    "per layer": ({"gemma4.embedding_length_per_layer_input": 0}, {}, "is not part of this Gemma"),
    "last": (
        {"gemma4.attention.sliding_window_pattern": [True, False, True, False, True]},
        {},
        "the last layer of this Gemma 4 has a window",
    ),
    "yarn": ({"gemma4.rope.scaling.type": "yarn"}, {}, "rope_type is 'yarn'"),
    "no factors": ({}, {"rope_freqs.weight": None}, r"rope_freqs\.weight is missing"),
    "factors": ({}, {"rope_freqs.weight": (_FACTORS[::-1].copy(), F32)}, "first 1, and then 1e"),
    "few factors": ({}, {"rope_freqs.weight": (_FACTORS[:64], F32)}, "64 factors, expected 128"),
    "scalar": ({}, {"blk.1.layer_output_scale.weight": None}, "layers.1.layer_scalar is missing"),
    "a value": ({}, {"blk.0.attn_v.weight": None}, r"layers\.0\.self_attn\.v_proj\.weight is miss"),
    "table": ({}, {"per_layer_token_embd.weight": None}, "embed_tokens_per_layer.weight is miss"),
}


@pytest.mark.parametrize(("metadata", "tensors", "match"), REFUSED.values(), ids=list(REFUSED))
def test_wrong_keys_and_tensors_are_refused_by_name(
    tmp_path: Path, metadata: Metadata, tensors: dict[str, Stored | None], match: str
) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=match) as error:
        open_gguf(write_tiny(tmp_path, GEMMA4, metadata=metadata, tensors=tensors))
    assert str(error.value).startswith(f"{tmp_path / 'model.gguf'}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        "attention.key_length",
        "attention.key_length_swa",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "embedding_length_per_layer_input",
        "feed_forward_length",
        "rope.freq_base",
    ],
)
def test_a_file_without_a_required_key_is_refused(tmp_path: Path, key: str) -> None:
    fields = llama_metadata(GEMMA4)
    del fields[f"gemma4.{key}"]
    path = write_gguf(tmp_path / "m.gguf", fields, random_tensors(GEMMA4))
    with pytest.raises(ConfigError, match=f"no gemma4.{key}; convert the model again"):
        open_gguf(path)


def vocabulary() -> tuple[bytes, dict[str, Value]]:
    """The small tokenizer with Gemma 4's markers, and its keys."""
    tokenizer = gemma4_tokenizer()
    hf = {**GEMMA4, "vocab_size": tokenizer.get_vocab_size(), "vocab_size_per_layer_input": 0}
    hf["vocab_size_per_layer_input"] = hf["vocab_size"]
    content = tokenizer.to_str().encode()
    return content, make_vocabulary("m", content, config_from_hf(hf))


def test_the_vocabulary_survives_a_round_trip() -> None:
    content, keys = vocabulary()
    assert keys["tokenizer.ggml.model"] == "gemma4"
    original, again = json.loads(content), json.loads(rebuild_tokenizer(HERE, keys))
    assert again["model"]["merges"] == original["model"]["merges"]
    assert again["model"]["vocab"] == original["model"]["vocab"]
    flags = ({t["content"]: t["special"] for t in x["added_tokens"]} for x in (original, again))
    assert next(flags) == next(flags)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("merges", None, r"no tokenizer\.ggml\.merges"),
        ("merges", ["in g", "no_such piece"], "'no_such piece', expected two pieces"),
        ("token_type", None, "a type for every token"),
        ("tokens", None, r"tokenizer\.ggml\.tokens is not a list"),
    ],
)
def test_an_incomplete_vocabulary_is_refused(key: str, value: Value, match: str) -> None:
    _, keys = vocabulary()
    with pytest.raises(CheckpointError, match=match):
        rebuild_tokenizer(HERE, {**keys, f"tokenizer.ggml.{key}": value})
