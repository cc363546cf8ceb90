"""ONNX bundles with int8 caches, compared with the reference that rounds as they do."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings

from gemma_export.cli import run
from gemma_export.model.decoder import decoder
from gemma_export.model.int8_cache import LayerScales, scales_digest
from gemma_export.model.torch_ops import TorchOps
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.store import open_or_build_store
from gemma_export.targets.onnx.target import EXACT
from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import SessionError
from gemma_runtime.manifest import AttentionKind, TensorRole
from gemma_runtime.proof.agreement import compare_logits
from gemma_runtime.proof.goldens import top_logits
from gemma_runtime.proof.verify import Verdict, limits_of, verify_bundle
from gemma_runtime.session import Logits, Session, open_session
from tests.export.conftest import Export, TinyCheckpoint, only
from tests.export.models import DENSE, E2B, GEMMA2, GEMMA3, WINDOW, eager_logits
from tests.export.rewinding import OPERATIONS, Operation, check_operations, check_rewinds

CONTEXT = 224
SLOTS = WINDOW + 64
TOKENS = np.random.default_rng(2).integers(0, 96, CONTEXT).tolist()
pytestmark = only(GEMMA2, GEMMA3, E2B, DENSE)


@pytest.fixture(scope="module")
def int8_bundle(tiny: TinyCheckpoint, export: Export) -> Bundle:
    """Float weights, so that only the caches round."""
    return export(tiny.folder, "none", context=CONTEXT, cache="int8")


@pytest.fixture(scope="module")
def rounded(tiny: TinyCheckpoint, int8_bundle: Bundle) -> Logits:
    """The reference's logits for TOKENS, with the bundle's scales: (T, V)."""
    store = open_or_build_store(tiny.open(), find_recipe("none"))
    config = tiny.open().config
    ops = TorchOps(
        torch.tensor([TOKENS]), config.rms_norm_eps, caches=held_scales(int8_bundle.directory)
    )
    with torch.inference_mode():
        logits: Logits = decoder(ops, config, store.weight)[0].numpy()
    return logits


def held_scales(folder: Path, file: str = "model.onnx") -> list[LayerScales]:
    """The scales in a graph, by layer."""
    graph = onnx.load(folder / file, load_external_data=False).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in _scales(graph)}
    layers = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    return [
        LayerScales(*(torch.from_numpy(arrays[name][0, :, 0].copy()) for name in node.input[12:]))
        for node in layers
    ]


def _scales(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    return [tensor for tensor in graph.initializer if tensor.name.startswith("cache_scales")]


def fed(session: Session, chunks: Sequence[int]) -> tuple[Logits, list[int]]:
    """Prefill TOKENS in chunks; the logits after each, and the tokens' positions."""
    session.reset()
    ends = np.cumsum(chunks)
    rows = [session.prefill(TOKENS[e - c : e]) for e, c in zip(ends, chunks, strict=True)]
    return np.stack(rows), [int(end) - 1 for end in ends]


def test_scores_are_those_of_the_reference_with_rounded_caches(
    tiny: TinyCheckpoint, int8_bundle: Bundle, rounded: Logits
) -> None:
    """The session is 50 times closer to it than to float caches, past all windows and slots."""
    exact = eager_logits(tiny.model, TOKENS).numpy()
    with open_session(int8_bundle, threads=1) as session:
        scored = session.score(TOKENS)
    to_rounded, to_float = (
        compare_logits(scored, top_logits(logits, 96)) for logits in (rounded, exact)
    )
    print(to_rounded, to_float)
    assert to_float.mean_kl < 1e-3
    assert to_rounded.mean_kl < to_float.mean_kl / 50
    assert to_rounded.top1 + to_rounded.near_ties / to_rounded.positions == 1


@pytest.mark.parametrize(
    "chunks",
    [
        [1] * (3 * WINDOW + 5),
        [7] * 30,
        [WINDOW - 1, 2, 1, WINDOW + 1, 1, 24, 3, 100],
        [CONTEXT],
    ],
    ids=lambda chunks: f"{len(chunks)} chunks",
)
def test_chunks_of_any_length_round_the_same_keys_and_values(
    int8_bundle: Bundle, chunks: list[int]
) -> None:
    """Attention reads the rounded keys also of the chunk that is being written."""
    with open_session(int8_bundle, threads=1) as session:
        expected = session.score(TOKENS)
        logits, positions = fed(session, chunks)
    assert np.abs(logits - expected[positions]).max() <= 1e-3


def test_a_reset_session_ignores_earlier_tokens(int8_bundle: Bundle) -> None:
    with open_session(int8_bundle, threads=1) as session:
        expected = session.score(TOKENS[: WINDOW + 3])
        session.reset()
        session.prefill(TOKENS[30:200])
        session.reset()
        assert np.array_equal(session.score(TOKENS[: WINDOW + 3]), expected)


@pytest.mark.parametrize("mark", [False, True])
def test_a_session_goes_back_bit_for_bit(int8_bundle: Bundle, mark: bool) -> None:
    positions = [1, WINDOW - 1, WINDOW + 1, SLOTS - 1, SLOTS, SLOTS + 1, 2 * SLOTS, 200]
    with open_session(int8_bundle, threads=1) as session:
        answers = check_rewinds(session, TOKENS, positions, 20, mark)
    if mark:
        assert answers == positions


@settings(max_examples=15, deadline=None)
@given(operations=OPERATIONS)
def test_any_operations_leave_the_caches_of_a_fresh_session(
    int8_bundle: Bundle, operations: list[Operation]
) -> None:
    with open_session(int8_bundle, threads=1) as one, open_session(int8_bundle, threads=1) as two:
        check_operations(one, two, operations)


def test_the_manifest_describes_the_caches(int8_bundle: Bundle) -> None:
    manifest = int8_bundle.manifest
    assert manifest.cache_dtype == "int8"
    assert manifest.target.min_runtime_version == "1.31.0"
    assert manifest.quantization.calibration is None  # the codes depend on no text
    caches = manifest.int8_caches
    assert caches is not None
    assert caches.scales_digest == scales_digest(held_scales(int8_bundle.directory))
    assert (caches.calibration.source, caches.calibration.tokens) == ("random", 8 * 256)
    assert caches.quality == manifest.quality  # the weights are float
    assert 0 < caches.quality.mean_kl < 1e-3
    io = manifest.graph("decode")
    keys = [state for state in io.states if state.role is TensorRole.KEYS]
    assert {state.dtype for state in (*io.states, *io.outputs[1:])} == {"int8"}
    assert sum(np.prod([int(n) for n in key.shape]) for key in keys) * 2 == sum(
        manifest.cache_bytes(kind) for kind in AttentionKind
    )


def test_all_graphs_hold_the_same_scales_and_the_bundle_passes(
    tiny: TinyCheckpoint, export: Export
) -> None:
    bundle = export(tiny.folder, "int4", context=CONTEXT, cache="int8")
    names = ["model.onnx", "exact.onnx"]
    if not tiny.open().config.irregular:  # onnxruntime-genai runs no others
        names.append("genai.onnx")
    digests = {scales_digest(held_scales(bundle.directory, name)) for name in names}
    assert len(digests) == 1
    verification = verify_bundle(bundle, threads=1)
    assert verification.verdict is Verdict.PASS, verification.failures
    assert verification.limits == limits_of("onnx", "int8")
    assert "long" in verification.by_golden  # past every local cache


@pytest.mark.parametrize("part", ["keys", "values"])
def test_verify_catches_a_broken_scale(
    tiny: TinyCheckpoint, export: Export, tmp_path: Path, part: str
) -> None:
    """One layer's scales are a quarter of the right ones, so large keys or values are clipped."""
    bundle = export(tiny.folder, "int4", context=CONTEXT, cache="int8")
    broken = Bundle(copytree(bundle.directory, tmp_path / "broken"), bundle.manifest)
    model = onnx.load(broken.directory / EXACT, load_external_data=False)
    (scales,) = [t for t in _scales(model.graph) if t.name.endswith(f".1.{part}")]
    small = onnx.numpy_helper.to_array(scales) / np.float32(4)
    scales.CopyFrom(onnx.numpy_helper.from_array(small, scales.name))
    onnx.save(model, broken.directory / EXACT)
    verification = verify_bundle(broken, threads=1)
    assert verification.verdict is Verdict.FAIL
    assert verification.failures[0].startswith("mean KL of the float kernels is ")


def test_an_onnxruntime_without_int8_caches_is_refused(
    int8_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.29.0")
    with pytest.raises(SessionError, match=r"needs 1\.31\.0 or newer"):
        open_session(int8_bundle)


def test_full_caches_can_be_int8_too(tiny: TinyCheckpoint, export: Export, rounded: Logits) -> None:
    bundle = export(tiny.folder, "none", context=CONTEXT, cache="int8", full_cache=True)
    assert bundle.manifest.target.min_runtime_version == "1.31.0"
    with open_session(bundle, threads=1) as session:
        scored = session.score(TOKENS)
    assert compare_logits(scored, top_logits(rounded, 96)).mean_kl < 1e-5


def test_the_float_cache_is_the_default_and_has_no_scales(
    tiny: TinyCheckpoint, export: Export
) -> None:
    default, named = (export(tiny.folder, "none", cache=cache) for cache in (None, "float32"))
    assert default.manifest.int8_caches is None
    assert default.manifest.cache_dtype == "float32"
    assert replace(default.manifest, files={}) == replace(named.manifest, files={})


@pytest.mark.parametrize(
    ("target", "cache", "match"),
    [
        ("executorch", "int8", "--cache int8 is not for executorch: its XNNPACK delegates attend"),
        ("coreml", "int8", "Core ML's states hold float16 only; leave it out, or choose --target"),
        ("coreai", "int8", "--cache int8 is not for coreai"),
        ("gguf", "int8", "llama.cpp chooses the type when it loads the file"),
        ("hf", "int8", "transformers and vLLM choose the type"),
        ("onnx,executorch", "int8", "--cache int8 is not for executorch"),
        ("coreml", "float32", "--cache float32 is not for coreml"),
        ("onnx", "int4", "--cache is 'int4'; choose from int8, "),
    ],
)
def test_a_cache_type_that_a_target_lacks_is_refused_in_one_line(
    tiny: TinyCheckpoint,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    target: str,
    cache: str,
    match: str,
) -> None:
    flags = ["--target", target, "--cache", cache, "--output", str(tmp_path / "bundle")]
    for plan in ([], ["--plan"]):
        assert run(["--checkpoint", str(tiny.folder), *flags, *plan]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert match in line
    assert not (tmp_path / "bundle").exists()
