"""Core ML packages of tiny Gemma 4s in our interpreter: shared caches, per-layer embeddings."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from gemma_export.model.config import PER_LAYER_TABLE
from gemma_export.progress import unheard
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.store import open_or_build_store
from gemma_export.targets import ExportJob, Geometry, load_target
from gemma_runtime.backends.coreml import CoremlEngine, Interpreter
from gemma_runtime.bundle import Bundle
from gemma_runtime.contents.held_codes import codes_digest
from gemma_runtime.errors import TargetError
from gemma_runtime.manifest import AttentionKind, TensorRole
from gemma_runtime.mil.arguments import Result
from gemma_runtime.mil.instructions import Instruction
from gemma_runtime.mil.interpreter import Program
from gemma_runtime.mil.package import MilValue
from gemma_runtime.proof.agreement import compare_logits
from gemma_runtime.proof.goldens import top_logits
from gemma_runtime.proof.verify import Verdict, verify_bundle
from gemma_runtime.session import open_session
from tests.export.conftest import Export, TinyCheckpoint, dequantized, only, saved
from tests.export.loud import LOUD, check_every_way, save_half, save_loud_e2b
from tests.export.models import (
    DENSE,
    E2B,
    E4B,
    SHORT_DENSE,
    SHORT_E2B,
    UNIFIED,
    WINDOW,
    eager_logits,
)
from tests.export.rewinding import OPERATIONS, Operation, check_operations, check_resumes, cut

pytest.importorskip("coremltools")

TOKENS = np.random.default_rng(4).integers(0, 96, 96).tolist()
# Tolerance in logits: values are rounded to float16 up to twelve layers deep, and attention without
# a scale passes errors on.
NEAR = 0.1

every = only(E2B, E4B, DENSE)  # the 12B differs from the 31B in its config alone


@pytest.fixture(scope="module")
def float_bundle(tiny: TinyCheckpoint, export: Export) -> Bundle:
    return export(tiny.folder, "none", target="coreml", prefill=8)


@every
def test_every_way_to_feed_tokens_is_close_to_float32(
    tiny: TinyCheckpoint, float_bundle: Bundle
) -> None:
    check_every_way(float_bundle, tiny, TOKENS, NEAR)


def keep_unrounded(
    program: Program, instruction: Instruction, result: Result, values: dict[str, MilValue]
) -> None:
    results = result if isinstance(result, list) else [result]
    for output, value in zip(instruction.outputs, results, strict=True):
        assert value.shape == output.type.shape
        values[output.name] = value


@only(E2B, DENSE)
def test_without_rounding_the_graph_gives_the_logits_of_transformers(
    tiny: TinyCheckpoint, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float16's noise could hide a small fault. Here results are kept in float32.

    Weights are such that float16 holds them. Rounded are only cosines, sines and a few factors,
    like the square root of the width.
    """
    model = save_half(tiny.tiny, tmp_path / "half")
    bundle = export(tmp_path / "half", "none", target="coreml", prefill=8)
    monkeypatch.setattr(Program, "_keep", keep_unrounded)
    expected = eager_logits(model, TOKENS[:70]).numpy()
    with open_session(bundle) as session:
        figures = compare_logits(session.score(TOKENS[:70]), top_logits(expected, 96), 0.01)
    print(figures)
    assert figures.mean_kl <= 1e-6
    assert figures.mean_abs <= 2e-3


@only(E2B, E4B)
def test_only_layers_with_a_cache_of_their_own_have_room_in_the_states(
    float_bundle: Bundle,
) -> None:
    graph = float_bundle.manifest.graph("decode")
    for state in graph.states:
        owners = [
            layer
            for layer in float_bundle.manifest.layers
            if layer.kind is state.kind and layer.source is None
        ]
        slots = owners[0].slots + 32
        assert state.shape == (len(owners) * 2 * owners[0].kv_heads, slots, owners[0].head_dim)
    assert {state.kind for state in graph.states} == set(AttentionKind)


@only(SHORT_E2B)
@pytest.mark.parametrize("quant", ["none", "int4", "int4-asym"])
def test_the_per_layer_table_lies_outside_the_package(
    tiny: TinyCheckpoint, export: Export, quant: str
) -> None:
    bundle = export(tiny.folder, quant, target="coreml", prefill=8)
    graph, config = bundle.manifest.graph("prefill"), tiny.open().config
    assert graph.tensor(TensorRole.PER_LAYER).shape == (8, len(config.kinds) * config.per_layer)
    assert bundle.path("per_layer").name in bundle.manifest.files
    written = next(bundle.directory.rglob("weight.bin")).read_bytes()
    store = open_or_build_store(tiny.open(), find_recipe(quant))
    if quant != "none":
        codes = store.weight(PER_LAYER_TABLE).codes(0, 96).codes.numpy()
        flipped = codes if quant == "int4-asym" else codes ^ 0x88
        assert flipped.tobytes() not in written
        assert codes.tobytes() in bundle.path("per_layer").read_bytes()
        assert codes_digest(bundle) == bundle.manifest.quantization.codes_digest


@only(SHORT_E2B, SHORT_DENSE)
@pytest.mark.parametrize("quant", ["int4", "int4-asym", "int8", "mixed"])
def test_quantized_bundles_give_the_logits_of_their_dequantized_weights(
    tiny: TinyCheckpoint, export: Export, quant: str
) -> None:
    bundle = export(tiny.folder, quant, target="coreml", prefill=8)
    expected = eager_logits(dequantized(tiny, quant), TOKENS).numpy()
    with open_session(bundle) as session:
        figures = compare_logits(session.score(TOKENS), top_logits(expected, 96), NEAR)
    print(figures)
    assert figures.mean_kl <= 1e-4
    assert figures.top1 + figures.near_ties / figures.positions == 1
    assert codes_digest(bundle) == bundle.manifest.quantization.codes_digest


@only(E2B, UNIFIED)
def test_a_bundle_passes_its_own_proof(tiny: TinyCheckpoint, export: Export) -> None:
    bundle = export(tiny.folder, "int4", target="coreml", prefill=8)
    verdict = verify_bundle(bundle).verdict
    print(verdict)
    assert verdict is not Verdict.FAIL


@only(SHORT_E2B)
@settings(max_examples=5, deadline=None)
@given(operations=OPERATIONS)
def test_a_rewound_session_is_as_good_as_a_fresh_one(
    float_bundle: Bundle, operations: list[Operation]
) -> None:
    with open_session(float_bundle) as session, open_session(float_bundle) as fresh:
        check_operations(session, fresh, operations)


@only(SHORT_E2B)
@pytest.mark.parametrize("length", [1, WINDOW, 2 * WINDOW + 3])
def test_a_session_goes_on_from_a_snapshot(float_bundle: Bundle, length: int) -> None:
    with open_session(float_bundle) as one, open_session(float_bundle) as other:
        check_resumes(one, other, cut(TOKENS[:length], 7))


@pytest.mark.parametrize("place", LOUD)
def test_what_overflows_float16_is_scaled_and_the_logits_stay_right(
    place: str, tmp_path: Path, export: Export
) -> None:
    """E2B's first MLP overflows as released: without a factor of its product, the logits are NaN.

    https://github.com/unslothai/unsloth-zoo/issues/600
    """
    loud = save_loud_e2b(place, tmp_path / "loud")
    bundle = export(loud.folder, "none", target="coreml", prefill=8)
    expected = eager_logits(loud.model, TOKENS[:40]).numpy()
    with open_session(bundle) as session:
        figures = compare_logits(session.score(TOKENS[:40]), top_logits(expected, 96), NEAR)
    print(place, figures)
    assert figures.mean_kl <= 1e-4

    store = open_or_build_store(loud.open(), find_recipe("none"))
    unscaled = ExportJob(loud.open().config, store, Geometry(128, 8), (1,), 0, loud.open())
    (tmp_path / "unscaled").mkdir()
    load_target("coreml").write(unscaled, tmp_path / "unscaled", unheard)
    engine = CoremlEngine(Bundle(tmp_path / "unscaled", bundle.manifest), Interpreter)
    assert np.isnan(engine.run(TOKENS[:8], 0)).all()


@only(SHORT_E2B, SHORT_DENSE)
def test_embeddings_looked_up_by_the_caller_give_the_same_logits(
    tiny: TinyCheckpoint, export: Export
) -> None:
    inside = export(tiny.folder, "int4", target="coreml", prefill=8)
    options = {"coreml_embed": "external"}
    external = export(tiny.folder, "int4", target="coreml", prefill=8, options=options)
    with open_session(external) as one, open_session(inside) as other:
        assert np.array_equal(one.score(TOKENS[:20]), other.score(TOKENS[:20]))
        assert np.array_equal(one.prefill(TOKENS[:19]), other.prefill(TOKENS[:19]))
    assert codes_digest(external) == external.manifest.quantization.codes_digest


def test_the_neural_engine_s_layout_takes_models_that_share_no_caches(
    tmp_path_factory: pytest.TempPathFactory, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma_export.targets.shared.apple_layout.ANE_BYTES", 150_000)
    dense = saved(SHORT_DENSE, tmp_path_factory)
    options = {"coreml_compute": "ane"}
    bundle = export(dense.folder, "int8-channel", target="coreml", prefill=8, options=options)
    assert len(bundle.manifest.graphs["decode"]) >= 2
    expected = eager_logits(dequantized(dense, "int8-channel"), TOKENS).numpy()
    with open_session(bundle) as session:
        assert np.abs(session.score(TOKENS) - expected).max() < NEAR
        session.reset()
        for start in range(0, 96, 12):
            logits = session.prefill(TOKENS[start : start + 12])
            assert np.abs(logits - expected[start + 11]).max() < NEAR


@only(SHORT_E2B)
def test_the_neural_engine_s_layout_refuses_shared_caches(tiny: TinyCheckpoint) -> None:
    with pytest.raises(TargetError, match=r"can't read each other's caches.* --coreml-compute gpu"):
        load_target("coreml", {"coreml_compute": "ane"}).caches(
            tiny.open().config, Geometry(128, 8)
        )
