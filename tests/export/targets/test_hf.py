"""Hugging Face bundles: transformers loads the folder and computes with the store's codes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gemma_export.checkpoint.folder import open_folder
from gemma_export.checkpoint.gguf import open_gguf
from gemma_export.formats.format import Format
from gemma_export.model.config import TABLE
from gemma_export.model.hf_config import config_from_hf
from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import QuietReporter
from gemma_export.quantize.kept import resolve_recipe
from gemma_export.quantize.recipe import Recipe, Rule, find_recipe
from gemma_export.quantize.store import open_or_build_store
from gemma_export.targets.hf.config import hf_config
from gemma_export.targets.hf.target import HfTarget
from gemma_export.targets.hf.weights import LOOKED_UP
from gemma_runtime.bundle import Bundle, open_bundle
from gemma_runtime.cli import run_command
from gemma_runtime.contents.held_codes import codes_digest
from gemma_runtime.errors import TargetError
from gemma_runtime.text.tokenizer import load_tokenizer
from tests.export.conftest import TinyCheckpoint, dequantized, only
from tests.export.gguf_files import GEMMA3 as GGUF_GEMMA3
from tests.export.gguf_files import write_tiny
from tests.export.models import GEMMA2, GEMMA3, GEMMA4S, TINIES, UNNORMED, eager_logits

TOKENS = list(range(40))  # more than two windows of 16
MIXED = Recipe(
    "mixed-bits",
    (
        Rule("*.0.mlp.down_proj.weight", Format(32)),
        Rule("*.down_proj.weight", Format(8, 32)),
        Rule("*.o_proj.weight", Format(4, 64)),
        Rule("*", Format(4)),
    ),
)
RECIPES = [*map(find_recipe, ("int4", "int8", "int8-channel", "none")), MIXED]
Captured = pytest.CaptureFixture[str]


def export_hf(source: Path, recipe: Recipe, output: Path) -> Bundle:
    request = ExportRequest(
        targets=("hf",),
        recipe=recipe,
        checkpoint=str(source),
        context_length=128,
        prefill_length=24,
        output=output,
    )
    return export_bundles(request, QuietReporter())[0].bundle


@only(GEMMA2, GEMMA3, *UNNORMED, *GEMMA4S)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_transformers_computes_the_logits_of_the_store_s_codes(
    tiny: TinyCheckpoint, tmp_path: Path, recipe: Recipe
) -> None:
    """The matrices are exact, also in several formats; the table is rounded to float16."""
    bundle = export_hf(tiny.folder, recipe, tmp_path / "bundle")
    store = open_or_build_store(tiny.open(), recipe)
    reference = dequantized(tiny, recipe)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name in LOOKED_UP and not store.formats[name].is_float:
                parameter.copy_(parameter.half())
    loaded = AutoModelForCausalLM.from_pretrained(
        bundle.directory, dtype=torch.float32, attn_implementation="eager"
    )
    loaded.train(False)
    difference = eager_logits(loaded, TOKENS) - eager_logits(reference, TOKENS)
    assert difference.abs().max() < 2e-5
    if recipe.name != "none":
        assert codes_digest(bundle) == store.codes_digest


@only(GEMMA2)
def test_float_tensors_are_bfloat16_only_where_that_is_exact(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    """A float32 checkpoint stays float32; a bfloat16 one doesn't double in size."""
    source = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.bfloat16)
    source.save_pretrained(tmp_path / "bfloat16")
    none = find_recipe("none")
    for folder, dtype in ((tiny.folder, torch.float32), (tmp_path / "bfloat16", torch.bfloat16)):
        bundle = export_hf(folder, none, tmp_path / f"{dtype}")
        tensors = load_file(bundle.directory / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        config = json.loads((bundle.directory / "config.json").read_text())
        assert config["dtype"] == str(dtype).removeprefix("torch.")
        assert "quantization_config" not in config
        assert open_bundle(bundle.directory).manifest.cache_dtype != "bfloat16"


@only(*TINIES, *UNNORMED, *GEMMA4S)
def test_config_json_gives_back_the_config(tiny: TinyCheckpoint) -> None:
    config = tiny.open().config
    assert config_from_hf(hf_config(config, None)) == config


def test_a_config_that_transformers_would_read_differently_is_refused(
    tiny: TinyCheckpoint,
) -> None:
    config = replace(tiny.open().config, embed_scale=11.0)
    with pytest.raises(TargetError, match=r"can't store embed_scale 11\.0: transformers"):
        hf_config(config, None)


@pytest.mark.parametrize(
    "fmt", [Format(4, 32, True), Format(8, 32, True), Format(4, 36), Format(4, int8_columns=128)]
)
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_formats_that_transformers_can_t_load_are_refused(form: str, fmt: Format) -> None:
    with pytest.raises(TargetError, match="hf can't store w as"):
        HfTarget(form).check({"w": fmt}, None)  # type: ignore[arg-type]


def test_tokenizer_template_and_stops_are_those_of_the_bundle(tmp_path: Path) -> None:
    source = write_tiny(tmp_path, GGUF_GEMMA3)
    bundle = export_hf(source, find_recipe("int4"), tmp_path / "bundle")
    theirs, ours = AutoTokenizer.from_pretrained(bundle.directory), load_tokenizer(bundle)
    ids = ours.encode("banana")
    assert theirs("banana")["input_ids"] == [bundle.manifest.bos_token, *ids]
    assert theirs.bos_token_id == bundle.manifest.bos_token
    assert theirs.chat_template == bundle.manifest.chat_template
    generation = GenerationConfig.from_pretrained(bundle.directory)
    assert tuple(generation.eos_token_id) == bundle.manifest.stop_tokens
    config = json.loads((bundle.directory / "config.json").read_text())
    assert config_from_hf(config) == open_gguf(source).config


@only(GEMMA3)
def test_sampling_values_of_the_source_are_kept(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny.folder).save_pretrained(tmp_path / "model")
    sampling = {"do_sample": True, "temperature": 0.5, "top_k": 64, "eos_token_id": 1}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(sampling))
    bundle = export_hf(tmp_path / "model", find_recipe("int4"), tmp_path / "bundle")
    generation = GenerationConfig.from_pretrained(bundle.directory)
    assert generation.do_sample
    assert (generation.temperature, generation.top_k) == (0.5, 64)


@only(GEMMA2)
def test_commands_that_need_a_session_say_what_runs_the_folder(
    tiny: TinyCheckpoint, tmp_path: Path, capsys: Captured
) -> None:
    bundle = export_hf(tiny.folder, find_recipe("int4"), tmp_path / "bundle")
    capsys.readouterr()
    for command in ("verify", "bench"):
        assert run_command([command, str(bundle.directory)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert "run it with transformers or vLLM" in line


@only(GEMMA2)
def test_an_altered_table_is_detected(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    bundle = export_hf(tiny.folder, find_recipe("int4"), tmp_path / "bundle")
    before, path = codes_digest(bundle), bundle.directory / "model.safetensors"
    table = load_file(path)[TABLE].numpy()
    other = table.copy()
    other[5, 7] += np.float16(1.0)
    path.write_bytes(path.read_bytes().replace(table.tobytes(), other.tobytes()))
    assert codes_digest(bundle) != before


@only(GEMMA3)
@pytest.mark.parametrize("recipe", RECIPES[:3], ids=lambda recipe: recipe.name)
def test_the_folder_is_a_checkpoint_whose_codes_source_keeps(
    tiny: TinyCheckpoint, tmp_path: Path, recipe: Recipe
) -> None:
    bundle = export_hf(tiny.folder, recipe, tmp_path / "bundle")
    written = open_folder(bundle.directory)
    assert written.config == tiny.open().config
    source = resolve_recipe(find_recipe("source"), written)
    assert set(source.rounded) <= {TABLE}
    kept = open_or_build_store(written, source.recipe)
    first = open_or_build_store(tiny.open(), recipe)
    for name, shape in first.shapes.items():
        if name != TABLE:
            rows = first.weight(name).rows(0, shape[0])
            assert torch.equal(kept.weight(name).rows(0, shape[0]), rows), name
