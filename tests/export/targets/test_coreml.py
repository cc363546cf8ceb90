"""Core ML packages of tiny models in our interpreter, compared with transformers."""

from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma_export.progress import unheard
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.store import open_or_build_store
from gemma_export.targets import ExportJob, Geometry, Options, load_target
from gemma_runtime.backends.coreml import CoremlEngine, Interpreter
from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import BundleError, TargetError
from gemma_runtime.measure.bench import measure
from gemma_runtime.mil.blob import Array
from gemma_runtime.proof.agreement import compare_logits
from gemma_runtime.proof.goldens import top_logits
from gemma_runtime.proof.verify import Verdict, verify_bundle
from gemma_runtime.session import open_session
from tests.export.conftest import (
    LOUD,
    TinyCheckpoint,
    check_loud,
    dequantized,
    export_folder,
    only,
    save_loud,
)
from tests.export.models import (
    GEMMA2,
    SHORT_GEMMA3,
    SHORT_UNNORMED,
    TINIES,
    UNNORMED,
    WINDOW,
    Tiny,
    eager_logits,
    save_tiny,
)
from tests.runtime.measure.test_bench import rendered

pytest.importorskip("coremltools")

PREFILL = 8
TOKENS = np.random.default_rng(2).integers(0, 96, 128).tolist()
LENGTHS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 3 * WINDOW + 5, 96)


def export(
    tiny: TinyCheckpoint, quant: str, folder: Path, options: Options | None = None
) -> Bundle:
    output = folder / "bundle"
    return export_folder(
        tiny.folder, quant, output, target="coreml", prefill=PREFILL, options=options
    )


@pytest.fixture(scope="module")
def float_bundle(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(tiny, "none", tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="module")
def int4_bundle(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(tiny, "int4", tmp_path_factory.mktemp("int4"))


@only(*TINIES, *UNNORMED)
def test_float16_stays_close_to_float32_beyond_the_window(
    tiny: TinyCheckpoint, float_bundle: Bundle
) -> None:
    expected = eager_logits(tiny.model, TOKENS[:96]).numpy()
    with open_session(float_bundle) as session:
        for length in LENGTHS:
            session.reset()
            assert np.abs(session.prefill(TOKENS[:length]) - expected[length - 1]).max() < 0.05
        session.reset()
        assert np.abs(session.score(TOKENS[:96]) - expected).max() < 0.05


def test_chunks_of_every_length_give_the_logits_of_single_tokens(float_bundle: Bundle) -> None:
    """The padding of a short chunk must not reach the caches."""
    with open_session(float_bundle) as session:
        single = session.score(TOKENS[:90])
        for lengths in ([3, 8, 1, 5, 7, 8, 20, 2, 30], [29, 29, 29], [8] * 11):
            session.reset()
            for length in lengths:
                start = session.position
                logits = session.prefill(TOKENS[start : start + length])
                assert np.abs(logits - single[start + length - 1]).max() < 0.05


def test_the_engine_passes_inputs_with_the_declared_shapes_and_types(float_bundle: Bundle) -> None:
    """On macOS, Core ML takes the place of the interpreter and gets these inputs."""

    class InputChecker(Interpreter):
        def run(self, function: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
            declared = self.program.inputs(function)
            assert {n: (a.shape, a.dtype) for n, a in inputs.items()} == {
                n: (t.shape, t.dtype) for n, t in declared.items()
            }
            return super().run(function, inputs)

    engine = CoremlEngine(float_bundle, InputChecker)
    for start, stop in ((0, 5), (5, 6), (6, 14)):
        assert np.isfinite(engine.run(TOKENS[start:stop], start)).all()
    engine.close()


@pytest.mark.parametrize("quant", ["int4", "int4-asym", "int8", "mixed"])
def test_quantized_bundles_give_the_logits_of_their_dequantized_weights(
    short_gemma2: TinyCheckpoint, quant: str, tmp_path: Path
) -> None:
    bundle = export(short_gemma2, quant, tmp_path)
    expected = eager_logits(dequantized(short_gemma2, quant), TOKENS[:96]).numpy()
    with open_session(bundle) as session:
        figures = compare_logits(session.score(TOKENS[:96]), top_logits(expected, 96), 0.05)
    assert figures.mean_kl <= 1e-4
    assert figures.top1 + figures.near_ties / figures.positions == 1
    assert verify_bundle(bundle).verdict is Verdict.PASS


@pytest.mark.parametrize("quant", ["none", "int4-asym", "mixed"])
def test_embeddings_looked_up_by_the_caller_give_the_same_logits(
    short_gemma3: TinyCheckpoint, quant: str, tmp_path: Path
) -> None:
    external = export(short_gemma3, quant, tmp_path / "e", {"coreml_embed": "external"})
    assert (external.directory / external.manifest.roles["embedding"]).exists()
    inside = export(short_gemma3, quant, tmp_path / "i")
    with open_session(external) as one, open_session(inside) as other:
        assert np.array_equal(one.score(TOKENS[:20]), other.score(TOKENS[:20]))
        assert np.array_equal(one.prefill(TOKENS[:19]), other.prefill(TOKENS[:19]))


@only(SHORT_GEMMA3, SHORT_UNNORMED[1])
@pytest.mark.parametrize("quant", ["none", "int8-channel"])
def test_neural_engine_bundles_give_the_logits_of_their_dequantized_weights(
    tiny: TinyCheckpoint, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several packages, as models above a gigabyte need. Cache writes blend, without scatter."""
    monkeypatch.setattr("gemma_export.targets.shared.apple_layout.ANE_BYTES", 150_000)
    bundle = export(tiny, quant, tmp_path, {"coreml_compute": "ane"})
    packages = list(bundle.directory.glob("model*.mlpackage"))
    assert len(packages) >= 2
    assert [len(parts) for parts in bundle.manifest.graphs.values()] == [len(packages)] * 2
    assert not any(
        b"scatter" in next(package.rglob("model.mlmodel")).read_bytes() for package in packages
    )
    expected = eager_logits(dequantized(tiny, quant), TOKENS[:96]).numpy()
    with open_session(bundle) as session:
        assert np.abs(session.score(TOKENS[:96]) - expected).max() < 0.05
        for lengths in ([3, 8, 1, 5, 7, 8, 20, 2, 30], [29, 29, 29]):
            session.reset()
            for length in lengths:
                start = session.position
                logits = session.prefill(TOKENS[start : start + length])
                assert np.abs(logits - expected[start + length - 1]).max() < 0.05
    assert verify_bundle(bundle).verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("options", "quant", "match"),
    [
        ({"coreml_compute": "npu"}, "int4", "choose from gpu, ane"),
        ({"coreml_embed": "beside"}, "int4", "choose from inside, external"),
        ({"coreml_compute": "ane"}, "int4", "--quant int8-channel or none"),
        ({"coreml_compute": "ane", "coreml_embed": "inside"}, "none", "remove --coreml-embed"),
    ],
)
def test_options_that_the_neural_engine_does_not_support_are_refused(
    tiny: TinyCheckpoint, options: Options, quant: str, match: str
) -> None:
    formats = find_recipe(quant).formats(tiny.open().config)
    with pytest.raises(TargetError, match=match):
        load_target("coreml", options).check(formats, Geometry(64, 8))


def test_a_missing_part_is_refused(float_bundle: Bundle) -> None:
    graphs = {**float_bundle.manifest.graphs, "prefill": ()}
    bundle = replace(float_bundle, manifest=replace(float_bundle.manifest, graphs=graphs))
    with pytest.raises(BundleError, match="0 parts of prefill and 1 of decode"):
        CoremlEngine(bundle, Interpreter)


def test_a_benchmark_prints_its_figures(tmp_path: Path) -> None:
    """After measuring, it failed: it looked up the version of a package named "Core ML"."""
    tiny = TinyCheckpoint(GEMMA2, tmp_path / "tiny", save_tiny(GEMMA2, tmp_path / "tiny"))
    bundle = export(tiny, "int4", tmp_path)

    benchmark = measure([bundle.directory], threads=1, repeats=1, new_tokens=2)

    assert benchmark.bundles[0].target == "coreml"
    assert benchmark.machine.runtimes.keys() == {"coremltools", "gemma-export"}
    assert f"coremltools {metadata.version('coremltools')}" in rendered(benchmark)


@only(GEMMA2)
def test_two_exports_are_identical(
    tiny: TinyCheckpoint, int4_bundle: Bundle, tmp_path: Path
) -> None:
    again = export(tiny, "int4", tmp_path)
    assert again.manifest.files == int4_bundle.manifest.files


def test_rms_norm_of_small_values_adds_its_epsilon(tmp_path: Path) -> None:
    """The first token's values may be as small as epsilon. Without it, the 270M's KL was 5e-2."""
    model = GEMMA2.build()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(2e-3)
    model.save_pretrained(tmp_path / "quiet")
    bundle = export(TinyCheckpoint(GEMMA2, tmp_path / "quiet", model), "none", tmp_path)
    with open_session(bundle) as session:
        logits = session.score(TOKENS[:24])
    assert np.abs(logits - eager_logits(model, TOKENS[:24]).numpy()).max() < 0.05


def test_both_functions_share_one_copy_of_the_codes(
    tiny: TinyCheckpoint, int4_bundle: Bundle
) -> None:
    store = open_or_build_store(tiny.open(), find_recipe("int4"))
    weights = next(int4_bundle.directory.rglob("weight.bin")).read_bytes()
    for name in store.formats:
        packed = store.weight(name).codes(0, store.shapes[name][0]).codes.numpy()
        signed = packed ^ 0x88  # Core ML's int4 is two's complement, ours counts from -8
        assert weights.count(signed.tobytes()) == 1


@LOUD
def test_a_residual_beyond_float16_is_scaled_and_the_logits_stay_right(
    tmp_path: Path, kind: Tiny
) -> None:
    """Gemma 3's residuals exceed 65504: without scaling, the logits are NaN."""
    loud = save_loud(tmp_path / "loud", kind)
    bundle = export(loud, "none", tmp_path)
    check_loud(bundle, loud, TOKENS[:40], 0.1)

    store = open_or_build_store(loud.open(), find_recipe("none"))
    unscaled = ExportJob(loud.open().config, store, Geometry(128, PREFILL), (1,), 0, loud.open())
    (tmp_path / "unscaled").mkdir()
    load_target("coreml").write(unscaled, tmp_path / "unscaled", unheard)
    opened: list[Interpreter] = []

    def interpreter(package: Path) -> Interpreter:
        opened.append(Interpreter(package))
        return opened[-1]

    engine = CoremlEngine(Bundle(tmp_path / "unscaled", bundle.manifest), interpreter)
    assert np.isnan(engine.run(TOKENS[:8], 0)).all()
    assert opened[0].program.audit.first_not_finite is not None


def test_a_chunk_longer_than_the_ring_is_refused(tiny: TinyCheckpoint) -> None:
    with pytest.raises(TargetError, match="choose --prefill 16 or less"):
        load_target("coreml").caches(tiny.open().config, Geometry(128, WINDOW + 1))
