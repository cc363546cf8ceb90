"""ExecuTorch programs of tiny models, compared with transformers' eager attention."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_export.model.config import TABLE
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.store import open_or_build_store
from gemma_export.targets import Geometry, load_target, load_targets
from gemma_export.targets.executorch.target import MODEL
from gemma_runtime.backends.executorch_native import NativeEngine, build_native
from gemma_runtime.backends.step_session import StepSession
from gemma_runtime.bundle import Bundle
from gemma_runtime.contents.held_codes import codes_digest
from gemma_runtime.contents.pte_file import open_pte
from gemma_runtime.errors import ContextFull, SessionError, TargetError
from gemma_runtime.measure.profile import profile_bundle
from gemma_runtime.proof.agreement import compare_logits
from gemma_runtime.proof.goldens import top_logits
from gemma_runtime.proof.verify import Verdict, verify_bundle
from gemma_runtime.quiet import quiet
from gemma_runtime.session import open_session
from gemma_runtime.text.generate import generate
from tests.export.conftest import (
    Export,
    TinyCheckpoint,
    check_chunks,
    check_exact,
    dequantized,
    export_folder,
    only,
)
from tests.export.models import GEMMA2, TINIES, UNNORMED, WINDOW, eager_logits
from tests.export.rewinding import check_resumes, cut

pytest.importorskip("executorch")

LENGTHS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 3 * WINDOW + 5, 96)
TOKENS = np.random.default_rng(2).integers(0, 96, 128).tolist()


@pytest.fixture(scope="module")
def float_bundle(tiny: TinyCheckpoint, export: Export) -> Bundle:
    return export(tiny.folder, "none", target="executorch")


@pytest.fixture(scope="module")
def int4_bundle(tiny: TinyCheckpoint, export: Export) -> Bundle:
    return export(tiny.folder, "int4", target="executorch")


@only(*TINIES, *UNNORMED)
@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_and_score_give_the_logits_of_transformers(
    tiny: TinyCheckpoint, float_bundle: Bundle, length: int
) -> None:
    check_exact(float_bundle, tiny, TOKENS[:length])


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12), restart=st.integers(0, 12))
def test_any_chunks_and_resets_give_the_same_logits(
    tiny: TinyCheckpoint, float_bundle: Bundle, lengths: list[int], restart: int
) -> None:
    check_chunks(float_bundle, tiny, TOKENS, lengths, restart)


@only(*TINIES, *UNNORMED)
@pytest.mark.parametrize("recipe", ["int4", "int8-channel"])
def test_codes_give_almost_the_logits_of_their_dequantized_weights(
    tiny: TinyCheckpoint, export: Export, recipe: str
) -> None:
    """Not the same logits: activations are rounded to int8, with one scale per token."""
    bundle = export(tiny.folder, recipe, target="executorch")
    expected = eager_logits(dequantized(tiny, recipe), TOKENS[:96]).numpy()
    with open_session(bundle, threads=1) as session:
        figures = compare_logits(session.score(TOKENS[:96]), top_logits(expected, 96), 0.2)
    assert figures.mean_kl <= 5e-3
    assert figures.top1 + figures.near_ties / figures.positions == 1
    assert verify_bundle(bundle, threads=1).verdict is not Verdict.FAIL


@only(GEMMA2)
@pytest.mark.parametrize("recipe", ["int4", "int8-channel"])
def test_the_program_contains_the_codes_of_the_store_and_one_copy_of_the_table(
    tiny: TinyCheckpoint, export: Export, recipe: str
) -> None:
    store = open_or_build_store(tiny.open(), find_recipe(recipe))
    bundle = export(tiny.folder, recipe, target="executorch")
    path, flip = bundle.directory / MODEL, 0x80 if recipe == "int8-channel" else 0
    with open_pte(path) as pte:
        for name, fmt in store.formats.items():
            weight = store.weight(name)
            part = weight.codes(0, weight.shape[0])
            codes = part.codes.numpy() ^ flip
            assert bytes(pte.named_data(f"{name}.codes")) == codes.tobytes()
            stored = bytes(pte.named_data(f"{name}.scales"))
            if flip:
                scales = np.frombuffer(stored, np.float32)
            else:
                halves = np.frombuffer(stored, np.uint16)
                scales = (halves.astype(np.uint32) << 16).view(np.float32)
            assert (scales == part.scales.float().numpy().ravel()).all(), fmt
    table = (store.weight(TABLE).codes(0, 96).codes.numpy() ^ flip).tobytes()
    assert path.read_bytes().count(table) == 1
    assert codes_digest(bundle) == store.codes_digest


@only(GEMMA2)
def test_the_metadata_methods_return_the_values_of_the_manifest(float_bundle: Bundle) -> None:
    """ExecuTorch's own runners call these methods."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(float_bundle.directory / MODEL)
    metadata = {
        name: program.load_method(name).execute([])
        for name in sorted(program.method_names - {"forward"})
    }
    manifest = float_bundle.manifest
    assert metadata["get_max_seq_len"] == [manifest.prefill_length]
    assert metadata["get_max_context_len"] == [manifest.context_length]
    assert metadata["get_vocab_size"] == [manifest.vocab_size]
    assert metadata["get_bos_id"] == [manifest.bos_token]
    assert metadata["get_eos_ids"] == [*manifest.stop_tokens]
    assert metadata["enable_dynamic_shape"] == metadata["use_kv_cache"] == [True]
    assert metadata["use_sdpa_with_kv_cache"] == [False]


@only(GEMMA2)
@pytest.mark.parametrize("recipe", ["int4", "int8-channel"])
def test_the_native_runner_gives_the_same_logits_without_torch(
    tiny: TinyCheckpoint, export: Export, recipe: str
) -> None:
    bundle = export(tiny.folder, recipe, target="executorch")
    with open_session(bundle, threads=1) as session:
        expected = [session.prefill(TOKENS[:40]), *(session.decode(t) for t in TOKENS[40:60])]
    native = NativeEngine(bundle.directory / MODEL, threads=1)
    with StepSession(native, bundle.manifest) as session:
        logits = [session.prefill(TOKENS[:40]), *(session.decode(t) for t in TOKENS[40:60])]
    assert np.abs(np.stack(logits) - np.stack(expected)).max() <= 1e-5


@only(GEMMA2)
def test_the_native_runner_goes_on_from_a_snapshot(
    int4_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_session(int4_bundle, threads=1) as session:
        session.prefill(TOKENS[:5])
        foreign = session.save()
    monkeypatch.setenv("GEMMA_NATIVE", str(build_native()))
    with open_session(int4_bundle, 1) as session, open_session(int4_bundle, 1) as other:
        for length, chunk in ((1, 1), (15, 1), (16, 7), (35, 200), (90, 200)):
            check_resumes(session, other, cut(TOKENS[:length], chunk))
        with pytest.raises(SessionError, match=r"model\.pte, this session .* in gemma_native"):
            session.resume(foreign)


@only(GEMMA2)
def test_the_native_runner_generates_tokens_without_python(float_bundle: Bundle) -> None:
    model = str(float_bundle.directory / MODEL)
    command = [str(build_native()), model, "1", "24", "12", *map(str, TOKENS[:30])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    with open_session(float_bundle, threads=1) as session:
        assert [int(line) for line in done.stdout.split()] == list(
            generate(session, TOKENS[:30], max_new_tokens=12)
        )


@only(GEMMA2)
def test_the_variable_gemma_native_selects_another_runner(
    float_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, log = tmp_path / "runner", tmp_path / "log"
    runner.write_text(f'#!/bin/sh\necho "$2" > "{log}"\nexec "{build_native()}" "$@"\n')
    runner.chmod(0o755)
    with open_session(float_bundle, threads=1) as session:
        expected = session.prefill(TOKENS[:40])
    monkeypatch.setenv("GEMMA_NATIVE", str(runner))
    with open_session(float_bundle, threads=1) as session:
        assert np.abs(session.prefill(TOKENS[:40]) - expected).max() <= 1e-5
    assert log.read_text() == "1\n"


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF of another machine"])
@only(GEMMA2)
def test_a_runner_that_can_t_be_executed_gives_a_one_line_error(
    float_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    runner = tmp_path / "runner"
    if content is not None:
        runner.write_bytes(content)
        runner.chmod(0o755)
    monkeypatch.setenv("GEMMA_NATIVE", str(runner))
    with pytest.raises(SessionError, match=r"can't run .*\$GEMMA_NATIVE"):
        open_session(float_bundle, threads=1)


@only(GEMMA2)
def test_the_error_of_a_native_runner_says_why_it_can_t_load_the_model(
    tmp_path: Path, float_bundle: Bundle
) -> None:
    (tmp_path / MODEL).write_bytes((float_bundle.directory / MODEL).read_bytes()[:4000])
    engine = NativeEngine(tmp_path / MODEL, threads=1)
    with (
        StepSession(engine, float_bundle.manifest) as session,
        pytest.raises(SessionError, match="gemma_native ended: can't load the model, executorch"),
    ):
        session.decode(5)


@only(GEMMA2)
def test_a_profile_counts_the_calls_of_each_kernel(int4_bundle: Bundle) -> None:
    layers = len(int4_bundle.manifest.layers)
    calls = {time.operator: time.calls for time in profile_bundle(int4_bundle, 1).new_token}
    products = [calls[name] for name in calls if "QB4W" in name]
    assert sum(products) == 7 * layers + 1
    assert calls["index_put_"] == 2 * layers


def test_a_token_beyond_the_context_is_refused_and_changes_nothing(float_bundle: Bundle) -> None:
    with open_session(float_bundle, threads=1) as session:
        session.prefill(TOKENS)
        with pytest.raises(ContextFull):
            session.decode(5)
        assert session.position == 128


@pytest.mark.parametrize("recipe", ["int4-asym", "int8", "mixed"])
def test_formats_without_a_kernel_are_refused(tiny: TinyCheckpoint, recipe: str) -> None:
    formats = find_recipe(recipe).formats(tiny.open().config)
    with pytest.raises(TargetError, match=r"no kernel for .*--quant int4 or int8-channel"):
        load_target("executorch").check(formats, Geometry(64, 16))


@pytest.mark.parametrize(
    ("delegate", "match"),
    [
        ("qnn", "needs Qualcomm's .* choose from xnnpack, vulkan, coreml"),
        ("vulcan", "--delegate is 'vulcan'; choose from vulkan"),
        ("coreml", "add --prefill 1"),
        ("vulkan", "vulkan has no kernel for .* as int4-g32.*--quant none"),
    ],
)
def test_unsupported_delegates_are_refused(tiny: TinyCheckpoint, delegate: str, match: str) -> None:
    formats = find_recipe("int4").formats(tiny.open().config)
    with pytest.raises(TargetError, match=match):
        load_target("executorch", {"delegate": delegate}).check(formats, Geometry(64, 16))


def test_a_delegate_with_another_target_is_refused() -> None:
    with pytest.raises(TargetError, match="is an option of --target executorch"):
        load_targets(["onnx"], {"delegate": "vulkan"})


@only(*TINIES, *UNNORMED)
def test_the_traced_decoder_gives_the_logits_of_transformers(tiny: TinyCheckpoint) -> None:
    """Vulkan and Core ML lower this module. Here it runs eagerly, without these delegates."""
    with quiet():
        from gemma_export.targets.executorch.traced import TracedFrame

    checkpoint = tiny.open()
    store = open_or_build_store(checkpoint, find_recipe("none"))
    caches = load_target("executorch").caches(checkpoint.config, Geometry(128, 24))
    frame = TracedFrame(checkpoint.config, caches, 128, store)
    expected = eager_logits(tiny.model, TOKENS).numpy()
    for start in range(0, 120, 24):
        tokens = torch.tensor([TOKENS[start : start + 24]])
        logits = frame(tokens, torch.tensor([start])).detach().numpy()
        assert np.abs(logits[0, 0] - expected[start + 23]).max() <= 1e-4


@pytest.mark.parametrize(
    ("delegate", "quant", "prefill", "backend"),
    [("coreml", "int4", 1, b"CoreMLBackend"), ("vulkan", "none", 8, b"VulkanBackend")],
)
def test_other_delegates_are_lowered_and_opening_their_bundles_gives_an_error(
    short_gemma2: TinyCheckpoint,
    tmp_path: Path,
    delegate: str,
    quant: str,
    prefill: int,
    backend: bytes,
) -> None:
    bundle = export_folder(
        short_gemma2.folder,
        quant,
        tmp_path / "bundle",
        context=32,
        target="executorch",
        prefill=prefill,
        options={"delegate": delegate},
    )
    assert backend in (bundle.directory / MODEL).read_bytes()
    with pytest.raises(SessionError, match=r"can't load .*model\.pte"):
        open_session(bundle)


@pytest.mark.parametrize("keep", [0, 40, 4000, -1000])
@only(GEMMA2)
def test_a_truncated_program_gives_a_one_line_error(
    float_bundle: Bundle, tmp_path: Path, keep: int
) -> None:
    (tmp_path / MODEL).write_bytes((float_bundle.directory / MODEL).read_bytes()[:keep])
    with pytest.raises(SessionError, match=r"can't load .*model\.pte: .*export it again"):
        open_session(Bundle(tmp_path, float_bundle.manifest))
