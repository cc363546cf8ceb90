"""Reading config.json: the differences between Gemma's sizes, families and file versions."""

import pytest

from gemma_export.model.config import cache_layout, config_from_hf, is_multimodal
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


def test_official_sizes_have_their_published_parameter_counts() -> None:
    """In millions, from the model cards, without the vision tower."""
    published = {
        ("gemma2", "2b"): 2614,
        ("gemma2", "9b"): 9242,
        ("gemma2", "27b"): 27227,
        ("gemma3", "270m"): 268,
        ("gemma3", "1b"): 1000,
        ("gemma3", "4b"): 3880,
        ("gemma3", "12b"): 11766,
        ("gemma3", "27b"): 27009,
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
