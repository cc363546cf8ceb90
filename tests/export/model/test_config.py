"""Reading config.json: the differences between Gemma's sizes, families and file versions."""

from dataclasses import replace
from typing import Any

import pytest

from gemma_export.model.config import cache_layout
from gemma_export.model.hf_config import config_from_hf, is_multimodal
from gemma_export.model.sizes import OFFICIAL, find_official
from gemma_runtime.errors import ConfigError
from gemma_runtime.manifest import AttentionKind, Rope

LOCAL, GLOBAL = AttentionKind.LOCAL, AttentionKind.GLOBAL
GEMMA2 = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 4,
}
GEMMA3 = {**GEMMA2, "model_type": "gemma3_text", "num_hidden_layers": 13}
GEMMA4: dict[str, Any] = {**GEMMA3, "model_type": "gemma4_text"}


def test_official_sizes_have_their_published_parameter_counts() -> None:
    """In millions, from the model cards, without towers for images and sound.

    Gemma 4's cards round to 0.1 billion; its tensors have these sizes.
    """
    published = {
        ("gemma2", "2b"): 2614,
        ("gemma2", "9b"): 9242,
        ("gemma2", "27b"): 27227,
        ("gemma3", "270m"): 268,
        ("gemma3", "1b"): 1000,
        ("gemma3", "4b"): 3880,
        ("gemma3", "12b"): 11766,
        ("gemma3", "27b"): 27009,
        ("gemma4", "e2b"): 4629,
        ("gemma4", "e4b"): 7463,
        ("gemma4", "12b"): 11907,
        ("gemma4", "31b"): 30697,
        ("gemma", "2b"): 2506,
        ("gemma", "7b"): 8538,
        ("vaultgemma", "1b"): 1039,
    }
    assert {(o.family, o.size): round(o.config.parameters / 1e6) for o in OFFICIAL} == published


@pytest.mark.parametrize(
    ("size", "family", "scale"),
    [
        ("2b", None, 48.0),
        ("9b", None, 59.75),
        ("27b", None, 68.0),
        ("270m", None, 25.25),
        ("1b", None, 34.0),
        ("4b", None, 50.5),
        ("12b", None, 62.0),
        ("27b", "gemma3", 73.5),
        ("e2b", None, 39.25),
        ("e4b", None, 50.5),
    ],
)
def test_the_embedding_scale_is_rounded_to_bfloat16(
    size: str, family: "str | None", scale: float
) -> None:
    assert find_official(size, family).config.embed_scale == scale


def test_the_embedding_scale_of_a_float32_checkpoint_is_not_rounded() -> None:
    config = config_from_hf({**GEMMA2, "hidden_size": 3584, "torch_dtype": "float32"})
    assert config.embed_scale == pytest.approx(3584**0.5, rel=1e-7)


def test_the_27b_models_scale_queries_by_width_over_heads() -> None:
    assert find_official("27b").config.query_scale == pytest.approx(144**-0.5)
    assert find_official("27b", "gemma3").config.query_scale == pytest.approx(168**-0.5)
    assert find_official("2b").config.query_scale == 1 / 16


def test_gemma2_alternates_layers_and_starts_with_a_local_one() -> None:
    """An inverted pattern gives every layer the wrong window."""
    assert config_from_hf(GEMMA2).kinds == (LOCAL, GLOBAL, LOCAL, GLOBAL)


def test_every_sixth_gemma3_layer_is_global() -> None:
    kinds = config_from_hf(GEMMA3).kinds
    assert [i for i, kind in enumerate(kinds) if kind is GLOBAL] == [5, 11]


def test_gemma3_ropes_depend_on_layer_kind_and_model_size() -> None:
    small, large = find_official("1b").config, find_official("4b").config
    assert small.ropes == {LOCAL: Rope(10_000.0, 1.0), GLOBAL: Rope(1_000_000.0, 1.0)}
    assert large.ropes == {LOCAL: Rope(10_000.0, 1.0), GLOBAL: Rope(1_000_000.0, 8.0)}


def test_flat_and_nested_rope_fields_give_the_same_config() -> None:
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    flat = {
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    assert config_from_hf({**GEMMA3, "rope_parameters": nested}) == config_from_hf(
        {**GEMMA3, **flat}
    )


def test_only_gemma2_has_softcaps_and_only_gemma3_has_qk_norm() -> None:
    two, three = find_official("2b").config, find_official("1b").config
    assert (two.attn_softcap, two.final_softcap, two.qk_norm) == (50.0, 30.0, False)
    assert (three.attn_softcap, three.final_softcap, three.qk_norm) == (None, None, True)


def test_a_multimodal_config_gives_its_text_model() -> None:
    """The published 4b config omits heads, head size and vocabulary: transformers' defaults."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    config = {"model_type": "gemma3", "text_config": text, "eos_token_id": [1, 106]}
    assert is_multimodal(config)
    assert config_from_hf(config) == find_official("4b").config


def test_medgemma_s_configs_give_gemma3_s() -> None:
    """27b without a vision tower, and 4b with one, as their authors save them."""
    shared = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1000000,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "vocab_size": 262208,
        "model_type": "gemma3_text",
    }
    heads = {"num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128}
    sizes = {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62}
    text = {
        "architectures": ["Gemma3ForCausalLM"],
        "bos_token_id": 2,
        "eos_token_id": [1, 106],
        "query_pre_attn_scalar": 168,
        **shared,
        **heads,
        **sizes,
    }
    assert config_from_hf(text) == find_official("27b", "gemma3").config
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    sizes = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    pictures = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 255999,
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "eos_token_id": [1, 106],
        "text_config": {**shared, **heads, **sizes, "query_pre_attn_scalar": 256},
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 896},
    }
    assert is_multimodal(pictures)
    assert config_from_hf(pictures) == find_official("4b").config


def test_layers_of_gemma4_differ_in_heads_width_and_whose_cache_they_read() -> None:
    layers = find_official("e2b").config.layers
    local, full = layers[13], layers[14]
    assert (local.kind, local.head_dim, local.kv_heads, local.ffn) == (LOCAL, 256, 1, 6144)
    assert (full.kind, full.head_dim, full.kv_heads, full.ffn) == (GLOBAL, 512, 1, 6144)
    assert full.rope == Rope(1_000_000.0, 1.0, 0.25)
    assert {layer.index for layer in layers if layer.owns_cache} == set(range(15))
    assert {(x.kind, x.source, x.ffn) for x in layers[15:]} == {
        (LOCAL, 13, 12288),
        (GLOBAL, 14, 12288),
    }
    assert {layer.scale for layer in layers} == {1.0}


def test_global_layers_of_the_dense_gemma4_take_keys_as_values() -> None:
    config = find_official("31b").config
    assert {(x.kind, x.value_is_key, x.kv_heads) for x in config.layers} == {
        (LOCAL, False, 16),
        (GLOBAL, True, 4),
    }
    shapes = config.tensor_shapes()
    assert "model.layers.4.self_attn.v_proj.weight" in shapes
    assert "model.layers.5.self_attn.v_proj.weight" not in shapes


def test_12b_is_gemma3_s_unless_the_family_says_gemma4() -> None:
    assert find_official("12b").family == "gemma3"
    assert find_official("12b", "gemma4").hub_id == "google/gemma-4-12B-it"
    assert find_official("12b", "gemma4").config.sliding_window == 1024


@pytest.mark.parametrize("outer", ["gemma4", "gemma4_unified"])
def test_a_multimodal_gemma4_gives_its_text_model(outer: str) -> None:
    text = {**GEMMA4, "model_type": f"{outer}_text", "use_bidirectional_attention": "vision"}
    config = {"model_type": outer, "text_config": text, "eos_token_id": [1, 106, 50]}
    assert is_multimodal(config)
    read = config_from_hf(config)
    assert read == replace(config_from_hf(text), eos_tokens=(1, 106, 50))
    assert read.per_layer == (256 if outer == "gemma4" else 0)


def test_what_differs_by_layer_is_read_from_either_spelling() -> None:
    """transformers 5.2 and newer write `per_layer_config`, with keys as long as the last index."""
    older = {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
    own = {"head_dim": 512, "num_key_value_heads": 1}
    newer = {
        **GEMMA4,
        "attention_k_eq_v": True,
        "per_layer_config": {"05": own, "11": own, "12": own},
    }
    assert config_from_hf(older) == config_from_hf(newer)
    del newer["per_layer_config"]["05"]
    with pytest.raises(ConfigError, match="per_layer_config"):
        config_from_hf(newer)


def test_the_last_layer_of_gemma4_is_always_global() -> None:
    """transformers makes it so, whatever the file lists."""
    assert config_from_hf(GEMMA4).kinds[-1] is GLOBAL


def test_a_mixture_of_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="enable_moe_block is True"):
        config_from_hf({**GEMMA4, "enable_moe_block": True})
    with pytest.raises(ConfigError, match="size 26B-A4B of Gemma 4 can't be exported"):
        find_official("26B-A4B")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"head_dim": 33}, "head_dim is 33"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"num_key_value_heads": 3}, "expected a multiple of num_key_value_heads, 3"),
        ({"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0"),
        ({"model_type": "gemma4_text", "num_kv_shared_layers": 4}, "num_kv_shared_layers is 4"),
        ({"model_type": "gemma4_text", "num_kv_shared_layers": 5}, "num_kv_shared_layers is 5"),
        ({"model_type": "gemma4_text", "vocab_size_per_layer_input": 9}, "expected vocab_size"),
    ],
)
def test_the_error_for_a_wrong_config_names_the_field(
    change: dict[str, object], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        config_from_hf({**GEMMA2, **change})


def test_the_error_for_an_unknown_size_lists_the_closest_sizes_first() -> None:
    with pytest.raises(ConfigError, match=r"unknown size '2bb'; choose from 2b,"):
        find_official("2bb")


def test_local_caches_have_window_plus_slack_slots_but_never_more_than_the_context() -> None:
    config = find_official("1b").config
    assert {c.slots for c in cache_layout(config, 4096, 64) if c.window} == {576}
    assert {c.slots for c in cache_layout(config, 540, 64)} == {540}
    assert {c.slots for c in cache_layout(config, 4096, None)} == {4096}
