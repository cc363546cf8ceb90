"""ONNX bundles of tiny Gemma 4s: shared caches, per-layer embeddings, two head sizes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from gemma_export.model.config import PER_LAYER_TABLE
from gemma_export.targets.onnx.target import DATA, PER_LAYER
from gemma_runtime.backends.ort import OrtSession
from gemma_runtime.backends.packed import pack_weights
from gemma_runtime.bundle import Bundle
from gemma_runtime.contents.held_codes import codes_digest
from gemma_runtime.proof.agreement import compare_logits
from gemma_runtime.proof.goldens import top_logits
from gemma_runtime.proof.verify import Verdict, verify_bundle
from gemma_runtime.session import open_session
from tests.export.conftest import Export, TinyCheckpoint, check_exact, dequantized, only
from tests.export.models import E2B, E4B, GEMMA4S, eager_logits
from tests.export.rewinding import OPERATIONS, Operation, check_operations
from tests.export.targets.test_onnx import LENGTHS, TOKENS, chunked, graph

every = only(*GEMMA4S)
edge = only(E2B, E4B)
# A ring of window + slack slots is full at 80 tokens and then drops 65 at once.
LONG = np.random.default_rng(4).integers(0, 96, 250).tolist()


@pytest.fixture(scope="module")
def float_bundle(tiny: TinyCheckpoint, export: Export) -> Bundle:
    return export(tiny.folder, "none", context=256)


@every
@pytest.mark.parametrize("length", [*LENGTHS, 128])
def test_prefill_decode_and_score_give_the_logits_of_transformers(
    tiny: TinyCheckpoint, float_bundle: Bundle, length: int
) -> None:
    check_exact(float_bundle, tiny, TOKENS[:length])


@every
def test_every_way_to_feed_tokens_is_exact_after_rings_have_dropped_some(
    tiny: TinyCheckpoint, float_bundle: Bundle
) -> None:
    expected = eager_logits(tiny.model, LONG).numpy()
    with open_session(float_bundle, threads=1) as session:
        assert np.abs(session.score(LONG) - expected).max() <= 1e-4
        for chunks in ([7] * 35, [24] * 10, [1] * 5 + [24, 3] * 9, [80, 65, 65], [79, 2, 64, 65]):
            ends = np.cumsum(chunks) - 1
            assert np.abs(chunked(session, LONG, chunks) - expected[ends]).max() <= 1e-4


@edge
def test_only_layers_with_a_cache_of_their_own_have_one(float_bundle: Bundle) -> None:
    manifest = float_bundle.manifest
    owners = [i for i, layer in enumerate(manifest.layers) if layer.source is None]
    io = manifest.graph("decode")
    assert sorted({spec.layer for spec in io.states if spec.layer is not None}) == owners
    for layer in manifest.layers[len(owners) :]:
        assert layer.source in owners
        assert layer.kind is manifest.layers[layer.source].kind
        assert layer.elements == 0
    assert manifest.target.min_runtime_version == "1.31.0"  # older ones end the process


@edge
@pytest.mark.parametrize("wanted", [[0], [0, 1], range(66)])
def test_positions_that_shared_rings_have_no_keys_for_give_no_numbers(
    float_bundle: Bundle, wanted: list[int]
) -> None:
    """A program that ignores the rule gets NaN. The session never asks for such positions."""
    with open_session(float_bundle, threads=1) as session:
        assert isinstance(session, OrtSession)
        session.prefill(LONG[:79])
        logits = np.empty((len(wanted), 96), np.float32)
        session._run(LONG[79:145], wanted, logits)
        assert np.isnan(logits).all()


@edge
@settings(max_examples=20, deadline=None)
@given(operations=OPERATIONS)
def test_a_rewound_session_is_as_good_as_a_fresh_one(
    float_bundle: Bundle, operations: list[Operation]
) -> None:
    with open_session(float_bundle, 1) as session, open_session(float_bundle, 1) as fresh:
        check_operations(session, fresh, operations)


@every
@pytest.mark.parametrize("quant", ["int8", "int4", "int4-asym", "mixed"])
def test_quantized_bundles_give_the_logits_of_their_dequantized_weights(
    tiny: TinyCheckpoint, export: Export, quant: str
) -> None:
    """In float kernels, so that rounded activations can't hide an error in the graph."""
    bundle = export(tiny.folder, quant, context=256)
    expected = eager_logits(dequantized(tiny, quant), LONG).numpy()
    with open_session(bundle, threads=1, exact=True) as session:
        assert np.abs(session.score(LONG) - expected).max() <= 1e-4
    with open_session(bundle, threads=1) as session:
        figures = compare_logits(session.score(LONG), top_logits(expected, 96), tie_margin=0.1)
    print(figures)
    assert figures.mean_kl <= 4e-3  # activations rounded to int8 in up to twelve layers
    assert codes_digest(bundle) == bundle.manifest.quantization.codes_digest


@every
def test_a_bundle_passes_its_own_proof(tiny: TinyCheckpoint, export: Export) -> None:
    bundle = export(tiny.folder, "int4", context=256)
    assert verify_bundle(bundle, threads=1).verdict is not Verdict.FAIL


@edge
def test_the_per_layer_table_lies_in_a_file_of_its_own(
    tiny: TinyCheckpoint, export: Export
) -> None:
    for quant in ("none", "int4", "int4-asym"):
        bundle = export(tiny.folder, quant, context=256)
        places = {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}["location"]
            for tensor in graph(bundle).initializer
            if tensor.external_data
        }
        aside = {name for name, place in places.items() if place == PER_LAYER}
        assert aside == {name for name in places if name.startswith(PER_LAYER_TABLE)}
        assert set(places.values()) == {DATA, PER_LAYER}
        assert PER_LAYER in bundle.manifest.files


@every
def test_no_files_for_onnxruntime_genai_are_written(float_bundle: Bundle) -> None:
    """It reads one head size and one cache per layer from its config."""
    assert "genai" not in float_bundle.manifest.roles
    assert not list(float_bundle.directory.glob("genai*"))


@edge
def test_packed_weights_give_the_same_logits(
    tiny: TinyCheckpoint, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = export(tiny.folder, "int4", context=256)
    with open_session(bundle, threads=1) as session:
        expected = session.score(LONG)
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path))
    pack_weights(bundle)
    with open_session(bundle, threads=1) as session:
        assert np.array_equal(session.score(LONG), expected)
