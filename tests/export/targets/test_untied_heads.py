"""A head apart from the embedding table is exported to every target, and its codes are kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from gemma_export.checkpoint.folder import open_folder
from gemma_export.checkpoint.gguf import open_gguf
from gemma_export.formats.format import INT4, INT4_ASYM, INT8
from gemma_export.model.config import HEAD, TABLE
from gemma_export.quantize.kept import resolve_recipe
from gemma_export.quantize.recipe import Recipe, Rule, find_recipe
from gemma_export.quantize.store import QuantizedStore, open_or_build_store
from gemma_runtime.bundle import Bundle
from gemma_runtime.contents.held_codes import codes_digest
from gemma_runtime.errors import RecipeError, TargetError
from gemma_runtime.session import open_session
from tests.export.conftest import Export, TinyCheckpoint, check_exact, dequantized, saved
from tests.export.gguf_files import GEMMA3 as GGUF_GEMMA3
from tests.export.gguf_files import write_tiny
from tests.export.llama_server import LlamaServer
from tests.export.models import (
    SHORT_GEMMA2,
    SHORT_GEMMA3,
    eager_logits,
    save_tiny,
    untied,
    with_head_scale,
)
from tests.export.targets.test_gguf import export_gguf

TOKENS = [3 + 7 * index % 90 for index in range(3 * 16 + 5)]


GEMMA2, GEMMA3 = (untied(with_head_scale(tiny)) for tiny in (SHORT_GEMMA2, SHORT_GEMMA3))


@pytest.fixture(scope="module", params=[GEMMA2, GEMMA3], ids=lambda tiny: tiny.name)
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TinyCheckpoint:
    """Replaces the shared fixture."""
    return saved(request.param, tmp_path_factory)


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_float32_bundles_give_the_logits_of_transformers(
    tiny: TinyCheckpoint, export: Export, target: str
) -> None:
    check_exact(export(tiny.folder, "none", target=target, prefill=8), tiny, TOKENS)


# Quantized kernels round activations, float16 rounds everything.
NEAR = {"onnx": 0.2, "executorch": 0.4, "coreml": 0.02, "coreai": 0.08}


@pytest.mark.parametrize("target", NEAR)
def test_int4_bundles_give_the_logits_of_their_own_codes(
    tiny: TinyCheckpoint, export: Export, target: str
) -> None:
    if target == "coreai":
        pytest.importorskip("coreai", reason="coreai-core has a wheel for few systems")
    bundle = export(tiny.folder, "int4", target=target, prefill=8)
    expected = _check_codes(bundle, tiny)
    with open_session(bundle, threads=1) as session:
        logits = session.score(TOKENS)
    assert np.abs(logits - expected).max() < NEAR[target]


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_transformers_loads_the_hugging_face_folder(
    tiny: TinyCheckpoint, export: Export, recipe: str
) -> None:
    bundle = export(tiny.folder, recipe, target="hf")
    loaded = AutoModelForCausalLM.from_pretrained(
        bundle.directory, dtype=torch.float32, attn_implementation="eager"
    )
    model: Any = dequantized(tiny, recipe)
    table = model.model.embed_tokens.weight
    with torch.no_grad():
        table.copy_(table.half())  # the target rounds the table, but not the head
    difference = eager_logits(loaded.train(False), TOKENS) - eager_logits(model, TOKENS)
    assert difference.abs().max() < 2e-5
    _check_codes(bundle, tiny, recipe)
    again = open_folder(bundle.directory)
    resolved = resolve_recipe(find_recipe("source"), again).recipe
    assert resolved.rule(HEAD).format == find_recipe(recipe).rule(HEAD).format
    head = again.codes(HEAD, 0, 96), _store(tiny, recipe).weight(HEAD).codes(0, 96)
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(*(c.parts().values() for c in head), strict=True)
    )


def _store(tiny: TinyCheckpoint, recipe: str) -> QuantizedStore:
    return open_or_build_store(tiny.open(), find_recipe(recipe))


def _check_codes(bundle: Bundle, tiny: TinyCheckpoint, recipe: str = "int4") -> NDArray[np.float32]:
    """The bundle holds the store's codes, of a head that matters; returns the logits they give."""
    store = _store(tiny, recipe)
    assert bundle.manifest.quantization.codes_digest == store.codes_digest
    if bundle.manifest.target.name != "coreai":  # which has no reader of codes
        assert codes_digest(bundle) == store.codes_digest
    model: Any = dequantized(tiny, recipe)
    logits = eager_logits(model, TOKENS).numpy()
    model.lm_head.weight = model.model.embed_tokens.weight
    assert np.abs(eager_logits(model, TOKENS).numpy() - logits).max() > 1
    return logits


def test_llama_cpp_reads_the_head_of_a_gemma_3(tmp_path: Path) -> None:
    source = write_tiny(tmp_path, {**GGUF_GEMMA3, "tie_word_embeddings": False})
    assert not open_gguf(source).config.tied
    bundle = export_gguf(tmp_path, source, "none")
    prompt = np.random.default_rng(1).integers(0, 22, 41).tolist()
    with open_session(export_gguf(tmp_path, source, "none", "onnx"), exact=True) as session:
        logits = session.prefill(prompt)
    expected = logits - np.logaddexp.reduce(logits)
    found = LlamaServer(bundle.directory / "model.gguf").log_probabilities(prompt, 64)
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_a_gemma_2_with_its_own_head_is_refused_for_llama_cpp(
    export: Export, tmp_path: Path
) -> None:
    save_tiny(GEMMA2, tmp_path)
    with pytest.raises(TargetError, match="head apart from the embedding table for gemma2"):
        export(tmp_path, "int4", target="gguf")


def test_a_head_s_own_rule_is_followed(tiny: TinyCheckpoint, export: Export) -> None:
    config = tiny.open().config
    assert find_recipe("mixed").formats(config)[HEAD] == find_recipe("mixed").formats(config)[TABLE]
    recipe = Recipe("own", (Rule(HEAD, INT8), Rule(TABLE, INT4_ASYM), Rule("*", INT4)))
    formats = recipe.formats(config)
    assert (formats[HEAD], formats[TABLE]) == (INT8, INT4_ASYM)
    split = Recipe("split", (Rule(TABLE, replace(INT4, int8_columns=128)), Rule("*", INT4)))
    with pytest.raises(RecipeError, match="int8_columns"):
        split.formats(config)
