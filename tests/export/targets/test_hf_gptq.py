"""`--hf-format gptq`: the store's codes in the layout of AutoGPTQ and GPTQModel."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from gemma_export.checkpoint.folder import open_folder
from gemma_export.cli import run
from gemma_export.formats.format import FLOAT, Format
from gemma_export.model.config import HEAD, TABLE
from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import QuietReporter
from gemma_export.quantize.kept import resolve_recipe
from gemma_export.quantize.recipe import Recipe, Rule, find_recipe
from gemma_export.quantize.store import QuantizedStore, open_or_build_store
from gemma_export.targets.hf import gptq
from gemma_export.targets.hf.weights import LOOKED_UP
from gemma_runtime.bundle import Bundle
from gemma_runtime.contents.held_codes import codes_digest
from gemma_runtime.errors import BundleError, TargetError
from tests.export.conftest import TinyCheckpoint, saved
from tests.export.models import SHORT_E2B, SHORT_GEMMA2, SHORT_GEMMA3, Tiny, save_tiny, untied

MIXED = Recipe(
    "mixed-bits",
    (
        Rule("*.0.mlp.down_proj.weight", FLOAT),
        Rule("*.1.self_attn.[qkv]_proj.weight", Format(8, 32)),
        Rule("*.down_proj.weight", Format(8, 32)),
        Rule("*.o_proj.weight", Format(4, 64)),
        Rule("*", Format(4)),
    ),
)
RECIPES = [*map(find_recipe, ("int4", "int8", "int8-channel")), MIXED]


def _wider(tiny: Tiny) -> Tiny:
    """With heads that fill the format's words."""
    config = copy.deepcopy(tiny.config)
    config.head_dim, config.global_head_dim = 32, 64
    return replace(tiny, config=config)


TINIES = (SHORT_GEMMA2, SHORT_GEMMA3, untied(SHORT_GEMMA3), _wider(SHORT_E2B))
Tensors = dict[str, NDArray[Any]]


@pytest.fixture(scope="module", params=TINIES, ids=lambda tiny: tiny.name)
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TinyCheckpoint:
    """Replaces the shared fixture."""
    return saved(request.param, tmp_path_factory)


def export_gptq(source: Path, recipe: Recipe, output: Path) -> Bundle:
    request = ExportRequest(
        targets=("hf",),
        recipe=recipe,
        checkpoint=str(source),
        context_length=128,
        prefill_length=24,
        output=output,
        options={"hf_format": "gptq"},
    )
    return export_bundles(request, QuietReporter())[0].bundle


def _unpacked(words: NDArray[Any], bits: int, axis: int) -> NDArray[Any]:
    """The numbers in int32 words along an axis, the first one in the lowest bits."""
    count = 32 // bits
    shifts = np.arange(words.shape[axis] * count) % count * bits
    spread = np.repeat(words.view(np.uint32), count, axis)
    return (spread >> np.expand_dims(shifts, 1 - axis).astype(np.uint32)) & ((1 << bits) - 1)


def _dequantized(tensors: Tensors, module: str, bits: int) -> NDArray[np.float32]:
    """(N, K): scales[g] * (code - (zero + 1)), the format's definition."""
    codes = _unpacked(tensors[f"{module}.qweight"], bits, 0).astype(np.int64)  # (K, N)
    zeros = _unpacked(tensors[f"{module}.qzeros"], bits, 1).astype(np.int64) + 1  # (G, N)
    group = tensors[f"{module}.g_idx"]
    scales = tensors[f"{module}.scales"].astype(np.float32)
    weights: NDArray[np.float32] = scales[group] * (codes - zeros[group]).astype(np.float32)
    return weights.T


def _override(config: dict[str, Any], module: str) -> dict[str, int] | None:
    """The format of a module as vLLM and GPTQModel find it; None if it is float."""
    for rule, fields in config.get("dynamic", {}).items():
        if re.match(rule[2:], module):
            return None if rule.startswith("-:") else {**config, **fields}
    return config


def _stored(tiny: TinyCheckpoint, recipe: Recipe) -> QuantizedStore:
    return open_or_build_store(tiny.open(), recipe)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_format_s_own_definition_gives_the_values_of_the_store(
    tiny: TinyCheckpoint, tmp_path: Path, recipe: Recipe
) -> None:
    bundle = export_gptq(tiny.folder, recipe, tmp_path / "bundle")
    store = _stored(tiny, recipe)
    assert codes_digest(bundle) == store.codes_digest
    tensors = load_file(bundle.directory / "model.safetensors")
    config = json.loads((bundle.directory / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["checkpoint_format"]) == ("gptq", "gptq")
    assert (config["sym"], config["desc_act"]) == (True, False)
    assert config["lm_head"] is not tiny.open().config.tied
    for name, fmt in store.formats.items():
        values = store.weight(name).rows(0, store.shapes[name][0]).numpy()
        module = name.removesuffix(".weight")
        own = _override(config, module)
        if name in LOOKED_UP:
            np.testing.assert_array_equal(tensors[name], values.astype(np.float16))
        elif fmt.is_float:
            assert own is None
            np.testing.assert_array_equal(tensors[name], values)
        else:
            group = -1 if fmt.per_channel else fmt.group
            assert own is not None
            assert (own["bits"], own["group_size"]) == (fmt.bits, group)
            np.testing.assert_array_equal(_dequantized(tensors, module, fmt.bits), values)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_folder_is_a_checkpoint_whose_codes_source_keeps(
    tiny: TinyCheckpoint, tmp_path: Path, recipe: Recipe
) -> None:
    """Bit for bit: also the head's, if it has its own."""
    bundle = export_gptq(tiny.folder, recipe, tmp_path / "bundle")
    written = open_folder(bundle.directory)
    assert written.config == tiny.open().config
    kept = open_or_build_store(written, resolve_recipe(find_recipe("source"), written).recipe)
    first = _stored(tiny, recipe)
    quantized = [
        name for name, fmt in first.formats.items() if not fmt.is_float and name not in LOOKED_UP
    ]
    assert (HEAD in quantized) is not tiny.open().config.tied
    for name in quantized:
        span = (0, first.shapes[name][0])
        ours, theirs = first.weight(name).codes(*span), kept.weight(name).codes(*span)
        if not first.formats[name].per_channel:  # which becomes smaller groups with equal scales
            assert all((a == b).all() for a, b in zip(ours[:2], theirs[:2], strict=True)), name
        assert (first.weight(name).rows(*span) == kept.weight(name).rows(*span)).all(), name


def test_layers_of_vllm_have_the_format_of_their_parts() -> None:
    """vLLM fuses q, k and v, and asks for the format under the fused name."""
    parts = {f"model.layers.0.self_attn.{name}_proj.weight": Format(8, 32) for name in "qkv"}
    names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj")
    others = {f"model.layers.0.{name}.weight": Format(4) for name in names}
    floats = {f"model.layers.1.mlp.{name}_proj.weight": FLOAT for name in ("gate", "up")}
    config = gptq.GPTQ.config({**parts, **others, **floats})
    assert config is not None
    (listed,) = config["modules_in_block_to_quantize"]
    assert sorted(f"{module}.weight" for module in listed) == sorted({**parts, **others})
    fused = _override(config, "model.layers.0.self_attn.qkv_proj")
    assert fused is not None
    assert fused["bits"] == 8
    assert _override(config, "model.layers.1.mlp.gate_up_proj") is None
    assert _override(config, "model.layers.0.mlp.gate_up_proj") is config
    assert gptq.GPTQ.config({**floats, TABLE: Format(4)}) is None


def test_float_weights_need_no_quantization_config(tmp_path: Path) -> None:
    save_tiny(SHORT_GEMMA2, tmp_path / "source")
    bundle = export_gptq(tmp_path / "source", find_recipe("none"), tmp_path / "bundle")
    assert "quantization_config" not in json.loads((bundle.directory / "config.json").read_text())
    assert bundle.manifest.target.packages == ("transformers",)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_an_altered_tensor_is_detected(tmp_path: Path, part: str) -> None:
    """Other zero points or groups would give other values with the same codes."""
    save_tiny(SHORT_GEMMA2, tmp_path / "source")
    bundle = export_gptq(tmp_path / "source", find_recipe("int4"), tmp_path / "bundle")
    before, path = codes_digest(bundle), bundle.directory / "model.safetensors"
    tensors = load_file(path)
    tensors[f"model.layers.1.mlp.down_proj.{part}"].reshape(-1)[-1] -= 1
    save_file(tensors, path)
    if part in ("qzeros", "g_idx"):
        with pytest.raises(BundleError, match=f"down_proj.{part} has"):
            codes_digest(bundle)
    else:
        assert codes_digest(bundle) != before


def test_a_head_whose_rows_fill_no_words_is_refused(tmp_path: Path) -> None:
    """Another token makes 97 rows, and the zero points are packed along them."""
    config = untied(SHORT_GEMMA2).config
    config.vocab_size = 97
    save_tiny(Tiny("odd", config, SHORT_GEMMA2.model), tmp_path / "source")
    with pytest.raises(TargetError, match=r"can't store lm_head\.weight of 97 x 128, expected"):
        export_gptq(tmp_path / "source", find_recipe("int4"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_an_unknown_format_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--size", "2b", "--target", "hf", "--hf-format", "gptq_v2"]) == 1
    assert "choose from gptq, compressed-tensors" in capsys.readouterr().err
