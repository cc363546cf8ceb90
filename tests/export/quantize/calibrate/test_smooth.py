"""Column factors that make rounding inputs lose less: found, exact, exported, refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_export.formats.format import INT4, INT8, Format
from gemma_export.model.config import ATTENTION_OUT, HEAD, TABLE, TABLE_FACTORS
from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import QuietReporter, unheard
from gemma_export.quantize.calibrate import smooth as smoothing
from gemma_export.quantize.calibrate.smooth import smooth, smoothing_factors
from gemma_export.quantize.calibrate.smoothed import SmoothedCheckpoint
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.recipe import find_recipe, load_recipe, write_recipe
from gemma_export.quantize.store import QuantizedStore, open_or_build_store
from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import RecipeError
from gemma_runtime.proof.verify import Verdict, verify_bundle
from gemma_runtime.session import open_session
from tests.export.conftest import (
    Export,
    Notes,
    RandomText,
    TinyCheckpoint,
    calibrated_store,
    divergence,
    mean_kl,
    only,
    store_divergence,
)
from tests.export.models import (
    GEMMA1,
    GEMMA2,
    GEMMA3,
    GEMMA4S,
    VAULT,
    eager_logits,
    save_tiny,
    untied,
)

EVERY_KIND = (GEMMA2, GEMMA3, untied(GEMMA2), GEMMA1, *GEMMA4S)
RECIPE = find_recipe("int8-smooth")
_LARGE = 7  # a channel


@pytest.fixture
def work(random_text: RandomText) -> Workspace:
    return random_text("int8-smooth", 32)


def _rounded(values: Tensor, group: int) -> Tensor:
    """Values (N, K) rounded to int8 in groups, as runtimes round inputs."""
    grouped = values.view(len(values), -1, group)
    step = grouped.abs().amax(-1, keepdim=True) / 127
    return ((grouped / step).round() * step).flatten(1)


@pytest.mark.parametrize("fmt", [INT8, Format(8, 128), Format(8, per_channel=True)], ids=str)
def test_factors_lower_the_error_of_products_of_rounded_inputs_and_weights(fmt: Format) -> None:
    draw = torch.Generator().manual_seed(3)
    inputs, rows = torch.randn(256, 128, generator=draw), torch.randn(64, 128, generator=draw)
    inputs[:, _LARGE] *= 200
    rows[:, _LARGE] /= 20
    exact, group = inputs @ rows.T, 128 if fmt.per_channel else fmt.group

    def error(factors: Tensor) -> float:
        product = _rounded(inputs / factors, group) @ _rounded(rows * factors, group).T
        return float((product - exact).square().mean())

    factors = smoothing_factors(inputs, rows, fmt)
    assert factors[_LARGE] > 3 * torch.cat((factors[:_LARGE], factors[_LARGE + 1 :])).max()
    assert error(factors) < 0.1 * error(torch.ones(128))
    size = inputs.square().mean(0).sqrt()
    assert error(factors) < min(error(size**power) for power in (0.25, 0.5, 1))


def test_ordinary_inputs_keep_their_columns_nearly_as_they_are() -> None:
    draw = torch.Generator().manual_seed(4)
    inputs, rows = torch.randn(256, 128, generator=draw), torch.randn(64, 128, generator=draw)
    assert (smoothing_factors(inputs, rows, INT8).log().abs() < 0.3).all()


@only(*EVERY_KIND, VAULT)
def test_a_smoothed_model_gives_the_same_logits(work: Workspace) -> None:
    smooth(work, unheard)
    smoothed = work.arranged()
    config, shapes = work.checkpoint.config, work.checkpoint.config.tensor_shapes()
    assert isinstance(smoothed.checkpoint, SmoothedCheckpoint)
    left = (ATTENTION_OUT[0], "per_layer")  # no norm or row before them can undo factors
    named = {n for n, s in shapes.items() if len(s) == 2 and not any(part in n for part in left)}
    assert set(smoothed.checkpoint.factors) == named - ({TABLE} - {config.head})

    def read(name: str) -> Tensor:
        return smoothed.checkpoint.rows(name, 0, shapes[name][0])

    assert divergence(work, read, smoothed.table_factors) < 1e-9
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", config.head):
        assert not torch.equal(read(name), work.checkpoint.rows(name, 0, shapes[name][0]))
        assert torch.equal(smoothed.checkpoint.rows(name, 3, 9), read(name)[3:9])
    assert (smoothed.table_factors is None) != config.tied
    assert not work.smoothing_residuals[0].exists()


# Not VaultGemma: its residual is mostly the looked-up rows, which factors of a tied table make less
# exact. With random gains, that costs the tiny model more than it gains.
@only(*EVERY_KIND)
def test_the_store_holds_smoothed_codes_and_the_factors_of_a_tied_table(work: Workspace) -> None:
    store = calibrated_store(work)
    assert (TABLE_FACTORS in store.file.tensors) == work.checkpoint.config.tied
    plain = open_or_build_store(work.checkpoint, find_recipe("int8"))
    assert store_divergence(work, store) < 1.5 * store_divergence(work, plain)
    name = "model.layers.1.self_attn.k_proj.weight"
    rows = store.shapes[name][0]
    exact, stored = work.arranged().checkpoint.rows(name, 0, rows), store.weight(name).rows(0, rows)
    assert float((stored - exact).norm() / exact.norm()) < 0.01


@only(GEMMA2)
def test_interrupted_smoothing_resumes_and_gives_the_same_codes(
    work: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(name: str, done: int) -> None:
        if name == "layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        smooth(work, stop)
    found: list[int] = []
    original = smoothing.smoothing_factors

    def count(inputs: Tensor, rows: Tensor, fmt: Format) -> Tensor:
        found.append(len(inputs))
        return original(inputs, rows, fmt)

    monkeypatch.setattr(smoothing, "smoothing_factors", count)
    resumed = calibrated_store(work).codes_digest
    assert len(found) == 2 * 3 + 1  # two layers of four were done; the head
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path / "other"))
    assert calibrated_store(work).codes_digest == resumed


def _save_large(folder: Path) -> TinyCheckpoint:
    """A tiny Gemma 2 whose head's and layers' inputs have a channel far larger than the others."""
    model = GEMMA2.build()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if "norm" in name and "post_" not in name:
                weight[_LARGE] = 150
            if any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate", "up_proj")):
                weight[:, _LARGE] /= 150
        weights[TABLE][:, _LARGE] /= 150
    model.save_pretrained(folder)
    return TinyCheckpoint(GEMMA2, folder, model)


def _divergence(bundle: Bundle, large: TinyCheckpoint) -> float:
    tokens = torch.randint(0, 96, (60,), generator=torch.Generator().manual_seed(5)).tolist()
    with open_session(bundle, threads=1) as session:
        ours = torch.from_numpy(session.score(tokens))
    return mean_kl(eager_logits(large.model, tokens), ours)


@pytest.mark.parametrize(("target", "recipe"), [("onnx", "int8"), ("executorch", "int8-channel")])
def test_a_bundle_with_large_input_channels_loses_a_tenth_of_what_plain_int8_loses(
    tmp_path: Path, export: Export, target: str, recipe: str
) -> None:
    """The graph that ships rounds its inputs to int8: in groups, or a token with one scale."""
    if target == "executorch":
        pytest.importorskip("executorch")
    large = _save_large(tmp_path)
    plain, smoothed = (export(tmp_path, r, target=target) for r in (recipe, f"{recipe}-smooth"))
    assert verify_bundle(smoothed, threads=1).verdict is Verdict.PASS
    assert _divergence(smoothed, large) < 0.1 * _divergence(plain, large)


@pytest.mark.parametrize(
    ("target", "options", "recipe"),
    [
        ("coreml", {}, "int8-smooth"),
        ("coreml", {"coreml_embed": "external"}, "int8-smooth"),
        ("coreml", {"coreml_compute": "ane"}, "int8-channel-smooth"),
        ("coreai", {}, "int8-smooth"),
    ],
)
def test_apple_targets_divide_looked_up_rows_by_the_factors(
    tmp_path: Path, export: Export, target: str, options: dict[str, str], recipe: str
) -> None:
    pytest.importorskip("coremltools" if target == "coreml" else "coreai_torch")
    large = _save_large(tmp_path)
    bundle = export(tmp_path, recipe, target=target, prefill=8, options=options)
    assert verify_bundle(bundle, threads=1).verdict is Verdict.PASS
    assert load_recipe(bundle.directory / "recipe.yaml").rule(TABLE).smooth
    assert _divergence(bundle, large) < 0.02


@only(*EVERY_KIND, VAULT)
def test_a_weighted_head_has_no_factors_and_less_error_where_inputs_are_large(
    random_text: RandomText,
) -> None:
    work = random_text("int8-weighted", 32)
    plain = open_or_build_store(work.checkpoint, find_recipe("int8"))
    store = calibrated_store(work)
    assert TABLE_FACTORS not in store.file.tensors
    head = work.checkpoint.config.head
    for name in store.formats:
        codes = [one.weight(name).part("codes", 0, 8) for one in (store, plain)]
        assert torch.equal(*codes) == (name != head)  # another table is only looked up
    power = work.curvature(head)
    assert power is not None
    rows = work.checkpoint.config.vocab_size

    def error(from_store: QuantizedStore) -> float:
        missed = from_store.weight(head).rows(0, rows) - work.checkpoint.rows(head, 0, rows)
        return float((missed.square() * power.diagonal()).sum())

    assert error(store) < 0.95 * error(plain)
    assert store_divergence(work, store) < 1.5 * store_divergence(work, plain)


@pytest.mark.parametrize("target", ["gguf", "hf"])
def test_targets_that_cannot_divide_looked_up_rows_smooth_only_the_layers(
    tmp_path: Path, target: str
) -> None:
    notes = Notes()
    save_tiny(GEMMA3, tmp_path / "model")  # llama.cpp has its own query scale for Gemma 2
    request = ExportRequest(
        targets=(target,),
        recipe=RECIPE,
        checkpoint=str(tmp_path / "model"),
        context_length=64,
        prefill_length=16,
        output=tmp_path / "bundle",
    )
    (result,) = export_bundles(request, notes)
    assert any(f"{target} can't divide looked-up rows" in note for note in notes.texts)
    recipe = load_recipe(result.bundle.directory / "recipe.yaml")
    assert not recipe.rule(TABLE).smooth
    assert recipe.rule("model.layers.0.mlp.up_proj.weight").smooth
    again = replace(request, recipe=recipe, output=tmp_path / "again")
    (repeated,) = export_bundles(again, QuietReporter())
    digests = [r.bundle.manifest.quantization.codes_digest for r in (result, repeated)]
    assert digests[0] == digests[1]


def test_a_recipe_file_repeats_smoothing(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(write_recipe(RECIPE))
    assert load_recipe(path) == RECIPE
    path.write_text("base: int8-smooth\ntensors:\n  '*.o_proj.*': {smooth: false}\n")
    recipe = load_recipe(path)
    assert not recipe.rule("model.layers.0.self_attn.o_proj.weight").smooth
    assert recipe.rule(TABLE).smooth
    assert recipe.rule(HEAD).smooth


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("base: int4\ntensors: {'*': {smooth: true}}", "embed_tokens.* is smooth in int4-g32"),
        ("base: source\ntensors: {'*': {smooth: true}}", "codes that are kept can't be changed"),
        (
            "base: int8\ntensors: {'*': {rounding: weighted}}",
            "q_proj.* in int8-g32 has the rounding",
        ),
        (
            "base: int4\ntensors: {'*embed*': {rounding: weighted}}",
            "expected that only for .* 8 bits",
        ),
    ],
)
def test_what_cannot_be_smooth_is_refused(
    tiny: TinyCheckpoint, tmp_path: Path, text: str, match: str
) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=match):
        load_recipe(tmp_path / "r.yaml").formats(tiny.open().config)


@only(GEMMA2)
def test_layers_may_be_smooth_in_int4_and_rounded_by_gptq(work: Workspace, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "base: int8-smooth\ntensors:\n  '*proj*': {bits: 4, rounding: gptq}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.formats(work.checkpoint.config)["model.layers.0.mlp.down_proj.weight"] == INT4
    smoothed = calibrated_store(replace(work, recipe=recipe))
    searched = open_or_build_store(work.checkpoint, find_recipe("int4-table8"))
    assert store_divergence(work, smoothed) < store_divergence(work, searched)
