"""Fields of config.json that transformers reads in ways that are easy to get wrong."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from gemma_export.checkpoint.folder import open_folder
from gemma_export.quantize.recipe import find_recipe
from gemma_export.request import ExportRequest, plan_exports
from gemma_runtime.errors import ConfigError, TargetError
from gemma_runtime.manifest import AttentionKind
from tests.export.models import GEMMA2, save_tiny
from tests.field.folders import check_same, config_of, configure, transformers_logits

LOCAL, GLOBAL = "sliding_attention", "full_attention"
ROPES: dict[str, dict[str, Any]] = {
    "none": {},
    "flat": {"rope_theta": 5e5, "rope_local_base_freq": 2e4},
    "scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "old type": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "only global": {"rope_parameters": {GLOBAL: {"rope_type": "linear", "factor": 8.0}}},
    "only local": {"rope_parameters": {LOCAL: {"rope_theta": 2e4}}, "rope_theta": 7e5},
    "null": {"rope_parameters": {GLOBAL: {"type": "linear", "factor": 8.0}, LOCAL: None}},
    "not nested": {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 4e5}},
    "local factor": {
        "rope_parameters": {LOCAL: {"rope_type": "linear", "factor": 2.0}, GLOBAL: {}},
    },
}


@pytest.mark.parametrize("fields", ROPES.values(), ids=list(ROPES))
def test_ropes_are_those_of_transformers(folder: Path, fields: dict[str, Any]) -> None:
    old = config_of(folder)
    (folder / "config.json").write_text("{}")
    configure(folder, **{k: v for k, v in old.items() if not k.startswith("rope")}, **fields)
    theirs = AutoConfig.from_pretrained(folder).rope_parameters
    for kind, rope in open_folder(folder).config.ropes.items():
        expected = theirs[LOCAL if kind is AttentionKind.LOCAL else GLOBAL]
        factor = expected["factor"] if expected["rope_type"] == "linear" else 1.0
        assert (rope.base, rope.factor) == (expected["rope_theta"], factor)


def test_a_partly_nested_rope_gives_the_logits_of_transformers(folder: Path) -> None:
    configure(folder, rope_parameters=ROPES["only global"]["rope_parameters"])
    check_same(open_folder(folder), transformers_logits(folder))


def test_gemma3_ignores_an_attention_softcap_as_transformers_does(folder: Path) -> None:
    configure(folder, attn_logit_softcapping=2.0)
    check_same(open_folder(folder), transformers_logits(folder))


def test_gemma2_without_softcaps_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    save_tiny(GEMMA2, tmp_path)
    configure(tmp_path, attn_logit_softcapping=None, final_logit_softcapping=None)
    check_same(open_folder(tmp_path), transformers_logits(tmp_path))


@pytest.mark.parametrize("pattern", ["sliding_window_pattern", "_sliding_window_pattern"])
def test_the_layer_pattern_is_that_of_transformers(folder: Path, pattern: str) -> None:
    configure(folder, layer_types=None, **{pattern: 2})
    check_same(open_folder(folder), transformers_logits(folder))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"rope_parameters": {GLOBAL: {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor"),
        ({"rope_parameters": {GLOBAL: {"rope_type": "yarn", "factor": 2.0}}}, "is 'yarn'"),
        ({"rope_parameters": "linear"}, "rope_parameters is 'linear', expected an object"),
    ],
)
def test_ropes_that_we_do_not_compute_are_refused(
    folder: Path, fields: dict[str, Any], match: str
) -> None:
    configure(folder, **fields)
    with pytest.raises(ConfigError, match=match):
        open_folder(folder)


@pytest.mark.parametrize("size", [12, 24, 40])
def test_a_head_size_without_a_kernel_is_refused_before_the_export(
    tmp_path: Path, size: int
) -> None:
    """ONNX Runtime loads such a graph, and fails when it runs."""
    hf = {"model_type": "gemma2", "num_hidden_layers": 2, "hidden_size": 128, "vocab_size": 96}
    (tmp_path / "config.json").write_text("{}")
    configure(tmp_path, **hf, intermediate_size=160, head_dim=size)
    request = ExportRequest(
        ("onnx",), find_recipe("none"), "random", config_file=tmp_path / "config.json"
    )
    with pytest.raises(TargetError, match=f"no attention kernel for head_dim {size}"):
        plan_exports(request)
