"""Core AI bundles of tiny models in Apple's own runtime, compared with transformers."""

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma_export.progress import unheard
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.store import open_or_build_store
from gemma_export.targets import ExportJob, Geometry, load_target, require_packages
from gemma_export.targets.coreai.target import ASSET, PROGRAM
from gemma_export.targets.shared.apple_layout import make_layout
from gemma_runtime.backends.chunk_inputs import ChunkInputs
from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import ContextFull, MissingExtra, SessionError, TargetError
from gemma_runtime.manifest import Manifest
from gemma_runtime.proof.agreement import compare_logits
from gemma_runtime.proof.goldens import top_logits
from gemma_runtime.proof.verify import Verdict, verify_bundle
from gemma_runtime.quiet import quiet
from gemma_runtime.session import open_session
from tests.export.conftest import (
    LOUD,
    TinyCheckpoint,
    check_loud,
    dequantized,
    export_folder,
    only,
    save_loud,
    saved,
)
from tests.export.models import (
    SHORT_GEMMA2,
    SHORT_GEMMA3,
    SHORT_UNNORMED,
    WINDOW,
    Tiny,
    eager_logits,
)

if find_spec("coreai") is None or find_spec("coreai_torch") is None:
    pytest.skip(
        "coreai-core and coreai-torch are not installed: their wheels are for Python 3.11 to 3.14 "
        "on Linux x86-64 (glibc 2.34) and macOS 26",
        allow_module_level=True,
    )

PREFILL = 8
TOKENS = np.random.default_rng(2).integers(0, 96, 128).tolist()
# Tolerance in logits: the runtime in the Linux wheel sums float16 products in float16, torch in
# float32. A test below shows that.
NEAR = 0.08

SHORTS = (SHORT_GEMMA2, SHORT_GEMMA3)
Exports = Callable[[TinyCheckpoint, str], Bundle]


@pytest.fixture(scope="module", params=SHORTS, ids=lambda tiny: tiny.name)
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TinyCheckpoint:
    """One short model of each family, since a step takes tens of milliseconds."""
    return saved(request.param, tmp_path_factory)


def export(tiny: TinyCheckpoint, quant: str, folder: Path) -> Bundle:
    output = folder / "bundle"
    return export_folder(tiny.folder, quant, output, target="coreai", prefill=PREFILL)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Exports each bundle once, in whatever order pytest runs the tests."""
    written: dict[tuple[str, str], Bundle] = {}

    def find(tiny: TinyCheckpoint, quant: str) -> Bundle:
        key = (tiny.tiny.name, quant)
        if key not in written:
            written[key] = export(tiny, quant, tmp_path_factory.mktemp(quant))
        return written[key]

    return find


@pytest.fixture
def float_bundle(tiny: TinyCheckpoint, exports: Exports) -> Bundle:
    return exports(tiny, "none")


@pytest.fixture
def int4_bundle(tiny: TinyCheckpoint, exports: Exports) -> Bundle:
    return exports(tiny, "int4")


@only(*SHORTS, *SHORT_UNNORMED)
def test_float16_stays_close_to_float32_beyond_the_window(
    tiny: TinyCheckpoint, float_bundle: Bundle
) -> None:
    """By single tokens and by chunks of many lengths: padding must not reach the caches."""
    expected = eager_logits(tiny.model, TOKENS[:96]).numpy()
    largest = 0.0
    with open_session(float_bundle) as session:
        largest = max(largest, np.abs(session.score(TOKENS[:96]) - expected).max())
        for lengths in ([3, 8, 1, 5, 7, 8, 20, 2, 30], [WINDOW - 1, WINDOW + 1, 3 * WINDOW + 5]):
            session.reset()
            for length in lengths:
                start = session.position
                logits = session.prefill(TOKENS[start : start + length])
                largest = max(largest, np.abs(logits - expected[start + length - 1]).max())
    print(f"{tiny.tiny.name}: max |Δlogit| {largest:.3f}, max |logit| {np.abs(expected).max():.1f}")
    assert largest < NEAR


def test_int4_gives_the_logits_of_its_dequantized_weights(
    tiny: TinyCheckpoint, int4_bundle: Bundle
) -> None:
    expected = eager_logits(dequantized(tiny, "int4"), TOKENS[:48]).numpy()
    with open_session(int4_bundle) as session:
        figures = compare_logits(session.score(TOKENS[:48]), top_logits(expected, 96), NEAR)
    print(figures)
    assert figures.mean_kl <= 1e-4
    assert figures.top1 + figures.near_ties / figures.positions == 1


@only(SHORT_GEMMA3)
def test_a_bundle_passes_verify(tiny: TinyCheckpoint, int4_bundle: Bundle) -> None:
    assert verify_bundle(int4_bundle).verdict is Verdict.PASS


def test_both_functions_share_one_copy_of_the_codes(
    tiny: TinyCheckpoint, int4_bundle: Bundle
) -> None:
    check_codes(tiny, "int4", int4_bundle)


@only(SHORT_GEMMA3)
def test_zero_points_and_int8_codes_are_stored_unchanged(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    bundle = export(tiny, "mixed", tmp_path)
    check_codes(tiny, "mixed", bundle)
    expected = eager_logits(dequantized(tiny, "mixed"), TOKENS[:20]).numpy()
    with open_session(bundle) as session:
        assert np.abs(session.score(TOKENS[:20]) - expected).max() < NEAR


def check_codes(tiny: TinyCheckpoint, recipe: str, bundle: Bundle) -> None:
    """The asset contains each code once; ours are offset binary, Core AI's two's complement."""
    store = open_or_build_store(tiny.open(), find_recipe(recipe))
    program = (bundle.directory / PROGRAM).read_bytes()
    for name, fmt in store.formats.items():
        part = store.weight(name).codes(0, store.shapes[name][0])
        signed = part.codes.numpy() ^ np.uint8(0x88 if fmt.bits == 4 else 0x80)
        assert program.count(signed.tobytes()) == 1
        assert program.count(part.scales.numpy().tobytes()) == 1


def test_the_asset_contains_no_path_of_the_exporting_machine(int4_bundle: Bundle) -> None:
    for path in (int4_bundle.directory / ASSET).iterdir():
        assert str(Path(__file__).parents[3]).encode() not in path.read_bytes()
        assert b".py" not in path.read_bytes()


@LOUD
def test_a_residual_beyond_float16_is_scaled_and_the_logits_stay_right(
    tmp_path: Path, kind: Tiny
) -> None:
    """Gemma 3's residuals exceed 65504: without scaling, the logits are NaN."""
    from gemma_export.targets.coreai.module import Step

    loud = save_loud(tmp_path / "loud", kind)
    bundle = export(loud, "none", tmp_path)
    check_loud(bundle, loud, TOKENS[:40], 3 * NEAR)

    config, store = loud.open().config, open_or_build_store(loud.open(), find_recipe("none"))
    unscaled = ExportJob(
        config, store, Geometry(128, PREFILL), (1,), max_residual=0, checkpoint=loud.open()
    )
    layout = make_layout(config, bundle.manifest.layers, store.formats, "gpu", external=False)
    inputs = ChunkInputs(bundle.manifest, {}, TOKENS[:1], 0).of(bundle.manifest.graph("decode"))
    step = Step(unscaled, layout, unheard)
    assert torch.isnan(step(*map(torch.from_numpy, inputs.values()))).all()


class _RowOfOnes(torch.nn.Module):
    """x → x · (1, 1, …), for 2,048 values in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ones", torch.ones(1, 2048, dtype=torch.float16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.get_buffer("ones"))


def _apply(module: torch.nn.Module, x: torch.Tensor, asset: Path) -> float:
    """The number that Core AI's runtime computes."""
    with quiet():
        from coreai.authoring import AIModelAsset
        from coreai.runtime import NDArray
        from coreai_torch import TorchConverter, get_decomp_table

        traced = torch.export.export(module.eval(), (x,)).run_decompositions(get_decomp_table())
        converter = TorchConverter(mode=TorchConverter.Mode.RELEASE)
        names = {"input_names": ["x"], "output_names": ["y"]}
        converter.add_exported_program(traced, entrypoint_name="main", **names)
        converter.to_coreai().save_asset(asset)

    async def run() -> float:
        async with AIModelAsset.load(asset).executable() as model:
            (result,) = (await model.load_function("main")({"x": NDArray(x.numpy())})).values()
            return float(result.numpy().item())

    return asyncio.run(run())


def test_the_runtime_adds_products_in_float16(tmp_path: Path) -> None:
    """2048 + 1 is 2048 in float16. So its logits are farther from float32's than Core ML's are.

    If this fails, Core AI has become better: give it Core ML's tolerances.
    """
    row = torch.zeros(1, 2048, dtype=torch.float16)
    row[0, 0], row[0, 1:1001] = 2048, 1
    assert _apply(_RowOfOnes(), row, tmp_path / "product.aimodel") == 2048
    assert row.float().sum() == 3048


def test_a_chunk_beyond_the_context_is_refused_and_changes_nothing(float_bundle: Bundle) -> None:
    with open_session(float_bundle) as session:
        session.prefill(TOKENS[:PREFILL])
        with pytest.raises(ContextFull):
            session.prefill(TOKENS)
        assert session.position == PREFILL


@only(SHORT_GEMMA2)
def test_a_session_runs_inside_a_running_event_loop(float_bundle: Bundle) -> None:
    """As in a notebook. Calls of the runtime are asynchronous; those of a session are not."""

    async def notebook() -> np.float32:
        with open_session(float_bundle) as session:
            return np.float32(session.decode(5)[0])

    with open_session(float_bundle) as session:
        assert asyncio.run(notebook()) == session.decode(5)[0]


_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from gemma_runtime import open_bundle, open_session
with open_session(open_bundle(sys.argv[1])) as session:
    print(session.prefill([2, 3, 4]).argmax())
"""


@only(SHORT_GEMMA2)
def test_a_session_needs_no_torch(float_bundle: Bundle) -> None:
    command = [sys.executable, "-c", _WITHOUT_TORCH, str(float_bundle.directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    with open_session(float_bundle) as session:
        assert done.stdout == f"{session.prefill([2, 3, 4]).argmax()}\n"
    assert done.stderr == ""


def _cut(length: int) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        program = folder / PROGRAM
        program.write_bytes(program.read_bytes()[:length])

    return cut


def _other_shape(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["graphs"]["decode"][0]["states"][0]["shape"][1] += 1
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (_cut(0), "main.mlirb was altered: .* export it again"),
        (_cut(4000), "main.mlirb was altered: .* export it again"),
        (_cut(-1), "main.mlirb was altered: .* export it again"),
        (lambda f: (f / PROGRAM).unlink(), "main.mlirb can't be read: No such file"),
        (lambda f: (f / ASSET / "main.hash").unlink(), "main.hash can't be read: No such file"),
        (
            lambda f: (f / ASSET / "metadata.json").write_text("{"),
            "can't load .*not in the correct",
        ),
        (lambda f: shutil.rmtree(f / ASSET), "can't be read: No such file"),
        (_other_shape, "decode has .* and manifest.json says .*; export it again"),
    ],
    ids=["empty", "cut", "short", "no-program", "no-hash", "metadata", "no-asset", "shapes"],
)
@only(SHORT_GEMMA2)
def test_a_damaged_asset_gives_a_one_line_error(
    float_bundle: Bundle, tmp_path: Path, damage: Callable[[Path], None], match: str
) -> None:
    """The runtime ends the whole process on bytes that it can't parse."""
    folder = tmp_path / "bundle"
    shutil.copytree(float_bundle.directory, folder)
    damage(folder)
    manifest = Manifest.from_json((folder / "manifest.json").read_bytes())
    with pytest.raises(SessionError, match=match):
        open_session(Bundle(folder, manifest))


def test_a_bundle_for_another_beta_of_the_runtime_is_refused(float_bundle: Bundle) -> None:
    target = replace(float_bundle.manifest.target, min_runtime_version="1.0.0b2")
    bundle = replace(float_bundle, manifest=replace(float_bundle.manifest, target=target))
    with pytest.raises(SessionError, match=r"for 1\.0\.0b2.* pip install coreai-core==1\.0\.0b2"):
        open_session(bundle)


def test_the_error_for_a_missing_package_names_the_extra(
    float_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(MissingExtra, match=r"coreai-core is not .* 'gemma-export\[coreai\]'"):
        open_session(float_bundle)
    monkeypatch.setitem(sys.modules, "coreai_torch", None)
    with pytest.raises(MissingExtra, match=r"coreai-torch is not .* 'gemma-export\[coreai\]'"):
        require_packages("coreai")


def test_a_chunk_longer_than_the_ring_is_refused(tiny: TinyCheckpoint) -> None:
    with pytest.raises(TargetError, match="choose --prefill 16 or less"):
        load_target("coreai").caches(tiny.open().config, Geometry(128, WINDOW + 1))
