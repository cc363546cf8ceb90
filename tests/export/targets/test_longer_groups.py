"""Groups of 64 and 128 in every target: the store's codes, and the logits that they give."""

import copy
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

from gemma_export.formats.gguf_file import read_header
from gemma_export.model.config import PER_LAYER_MATRICES
from gemma_export.model.sizes import OFFICIAL, Official
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.store import open_or_build_store
from gemma_runtime.contents.held_codes import codes_digest
from gemma_runtime.session import open_session
from tests.export.conftest import Export, TinyCheckpoint, dequantized, saved
from tests.export.models import (
    SHORT_GEMMA2,
    SHORT_GEMMA3,
    Tiny,
    eager_logits,
    with_head_scale,
)

TOKENS = [3 + 7 * index % 90 for index in range(3 * 16 + 5)]


def _divisible(tiny: Tiny) -> Tiny:
    """With inputs that groups of 128 divide, and a query scale that llama.cpp supports."""
    config = copy.deepcopy(with_head_scale(tiny).config)
    config.intermediate_size = 256
    return replace(tiny, config=config)


@pytest.fixture(scope="module", params=[SHORT_GEMMA2, SHORT_GEMMA3], ids=lambda tiny: tiny.name)
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TinyCheckpoint:
    """Replaces the shared fixture."""
    return saved(_divisible(request.param), tmp_path_factory)


# Quantized kernels round activations in the weights' groups, float16 rounds everything.
NEAR = {"onnx": 0.4, "executorch": 0.4, "coreml": 0.03}


@pytest.mark.parametrize("recipe", ["int4-g64", "int4-g128"])
@pytest.mark.parametrize("target", ["onnx", "executorch", "coreml", "gguf", "hf"])
def test_every_target_holds_the_codes_and_computes_with_them(
    tiny: TinyCheckpoint, export: Export, target: str, recipe: str
) -> None:
    bundle = export(tiny.folder, recipe, target=target, prefill=8)
    store = open_or_build_store(tiny.open(), find_recipe(recipe))
    assert codes_digest(bundle) == store.codes_digest == bundle.manifest.quantization.codes_digest
    if target not in NEAR:
        return  # run by other programs; GGUF's blocks have one scale for 32 codes
    expected = eager_logits(dequantized(tiny, recipe), TOKENS).numpy()
    with open_session(bundle, threads=1) as session:
        assert np.abs(session.score(TOKENS) - expected).max() < NEAR[target]


def test_a_scale_of_one_block_that_differs_is_detected(
    tiny: TinyCheckpoint, export: Export, tmp_path: Path
) -> None:
    bundle = export(tiny.folder, "int4-g128", target="gguf")
    copytree(bundle.directory, tmp_path / "altered")
    path = tmp_path / "altered" / "model.gguf"
    tensor = read_header(path).tensors["blk.1.ffn_down.weight"]
    data = bytearray(path.read_bytes())
    data[tensor.offset + 18] ^= 1  # the scale of the second block of 18 bytes
    path.write_bytes(data)
    altered = replace(bundle, directory=path.parent)
    assert codes_digest(altered) != bundle.manifest.quantization.codes_digest


@pytest.mark.parametrize("official", OFFICIAL, ids=lambda o: f"{o.family}-{o.size}")
def test_they_divide_every_matrix_of_the_official_sizes(official: Official) -> None:
    """But those that gate and project per-layer embeddings: they have 8 bits."""
    for group in (64, 128):
        formats = find_recipe(f"int4-g{group}").formats(official.config)
        named = {n: fmt for n, fmt in formats.items() if not fnmatchcase(n, PER_LAYER_MATRICES)}
        assert {fmt.group for fmt in named.values()} == {group}
