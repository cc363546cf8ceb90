"""Calibrated rounding: GPTQ against a naive one, the stream of layers, and taking work up again."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_export.formats.codes import dequantize, unpack
from gemma_export.formats.format import Format
from gemma_export.model.batch_ops import BatchOps, hold
from gemma_export.model.config import TABLE
from gemma_export.model.decoder import decoder
from gemma_export.progress import unheard
from gemma_export.quantize.calibrate import stream
from gemma_export.quantize.calibrate.fisher import weigh_table
from gemma_export.quantize.calibrate.gptq import gptq, inverse_factor, prepare, weighted_scales
from gemma_export.quantize.calibrate.layers import calibrate, calibrate_table
from gemma_export.quantize.calibrate.stream import pass_layers
from gemma_export.quantize.calibrate.text import LENGTH, default_texts, load_calibration
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.calibrated import CalibratedWeights
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.round import round_rows, shared_scale
from gemma_export.quantize.store import open_or_build_store
from gemma_runtime.errors import RecipeError
from tests.export.conftest import (
    RandomText,
    TinyCheckpoint,
    head_inputs,
    only,
    stages,
    store_divergence,
)
from tests.export.models import GEMMA2

FORMATS = (Format(4), Format(4, asymmetric=True), Format(8))


def _layer(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, and the Gram matrix of inputs that lean on one another."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, width, generator=draw) @ torch.randn(width, width, generator=draw)
    return torch.randn(rows, width, generator=draw), inputs.T @ inputs / 400


def _error(weights: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """Mean squared error of the products."""
    off = weights - rounded
    return float(((off @ gram) * off).sum())


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_gptq_serves_the_calibration_inputs_better_than_rounding(form: Format) -> None:
    weights, gram = _layer(24, 128)
    ours = _error(weights, dequantize(gptq(weights, prepare(gram), form), form), gram)
    searched = round_rows(weights, form, "searched")
    assert ours < 0.5 * _error(weights, dequantize(searched, form), gram)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_gptq_is_the_paper_s_greedy_rounding(form: Format) -> None:
    """Column by column, the rest re-solved by least squares each time, without a factor."""
    weights, gram = _layer(3, 64)
    order = torch.argsort(gram.diagonal(), descending=True)
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(64)
    worth = damped.inverse().diagonal().reciprocal().float().view(-1, form.group)
    scale, zero = weighted_scales(weights.view(3, -1, form.group), worth, form)
    current, codes = weights.double().clone(), torch.zeros(3, 64, dtype=torch.uint8)
    for place, column in enumerate(order.tolist()):
        s, z = scale[:, column // form.group].double(), zero[:, column // form.group].double()
        code = (current[:, column] / s).round().add(z).clamp(0, (1 << form.bits) - 1)
        codes[:, column] = code.to(torch.uint8)
        left = order[place + 1 :]
        off = current[:, column] - (code - z) * s
        if len(left):
            push = torch.linalg.solve(damped[left][:, left], damped[left, column])
            current[:, left] += off[:, None] * push
    block = gptq(weights, prepare(gram), form, refined=0)
    same = unpack(block.codes, form.bits, 64) == codes
    assert same.float().mean() > 0.99  # ties in float32
    assert torch.equal(block.scales.float(), scale)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_refinement_lowers_the_error_and_keeps_to_the_grid(form: Format) -> None:
    weights, gram = _layer(24, 128)
    inputs = prepare(gram)
    greedy, refined = (gptq(weights, inputs, form, refined=times) for times in (0, 3))
    was, now = (_error(weights, dequantize(block, form), gram) for block in (greedy, refined))
    assert now < 0.95 * was
    assert torch.equal(refined.scales.float(), shared_scale(refined.scales.float()))


def test_the_factor_is_of_the_inverse() -> None:
    _, gram = _layer(1, 32)
    order = torch.arange(31, -1, -1)
    factor = inverse_factor(gram, order, 0.01)
    damped = gram[order][:, order] + 0.01 * torch.eye(32)
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(32), atol=1e-2)
    assert torch.equal(factor, factor.triu())


def test_inputs_that_never_fire_are_rounded_too() -> None:
    weights, gram = _layer(4, 64)
    gram[:, 5] = gram[5] = 0
    back = dequantize(gptq(weights, prepare(gram), Format(4)), Format(4))
    assert torch.isfinite(back).all()


@pytest.fixture
def work(random_text: RandomText) -> Workspace:
    return random_text("int4-gptq", 8)


def test_the_stream_of_layers_is_the_decoder(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "product_dtype", lambda: torch.float32)
    config, tokens = work.checkpoint.config, work.calibration.tokens
    shapes = config.tensor_shapes()
    weights = hold({n: work.checkpoint.rows(n, 0, s[0]) for n, s in shapes.items()})
    gain = weights["model.norm.weight"].values
    pass_layers(work, work.teacher_residuals, unheard)
    hidden = head_inputs(work.teacher_residuals.last, config, gain)
    logits = hidden @ weights[TABLE].values.T
    if config.final_softcap is not None:
        logits = config.final_softcap * (logits / config.final_softcap).tanh()
    with torch.inference_mode():
        want = decoder(BatchOps(tokens, config.rms_norm_eps), config, weights.__getitem__)
    assert torch.allclose(logits.view_as(want), want, atol=2e-4)


def test_a_calibrated_model_is_closer_to_the_float_one(work: Workspace) -> None:
    store = open_or_build_store(
        work.checkpoint, work.recipe, None, CalibratedWeights(work, stages(unheard))
    )
    searched = open_or_build_store(work.checkpoint, find_recipe("int4"))
    assert store_divergence(work, store) < store_divergence(work, searched)


@only(GEMMA2)
def test_interrupted_work_goes_on_and_gives_the_same_codes(
    work: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[str] = []

    def stop(name: str, done: int) -> None:
        seen.append(name)
        if name == "layer 1":
            raise KeyboardInterrupt

    weigh_table(work, unheard)
    calibrate_table(work.arranged(), unheard)
    with pytest.raises(KeyboardInterrupt):
        calibrate(work.arranged(), stop)
    assert work.rounded_layers[0].exists()
    again: list[str] = []
    whole = CalibratedWeights(work, stages(lambda name, done: again.append(name)))
    resumed = open_or_build_store(work.checkpoint, work.recipe, None, whole).codes_digest
    assert "layer 0" not in again
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path / "other"))
    fresh = CalibratedWeights(work, stages(unheard))
    assert open_or_build_store(work.checkpoint, work.recipe, None, fresh).codes_digest == resumed


def test_default_text_is_none_of_the_evaluated(tmp_path: Path) -> None:
    evaluated = Path(__file__).parents[4].joinpath("benchmarks", "text.txt").read_text("utf-8")
    known = {line for text in default_texts() for line in _windows(text)}
    assert len(known) > 10_000
    shared = known & set(_windows(evaluated))
    assert not shared, sorted(shared)[:3]


def _windows(text: str) -> list[str]:
    """All runs of eight words; scripts without spaces give few, in none of the languages shared."""
    words = text.split()
    return [" ".join(words[i : i + 8]) for i in range(len(words) - 7)]


def test_text_that_is_too_short_is_refused(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    encoder = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
    encoder.pre_tokenizer = Whitespace()
    config = tiny.open().config
    (tmp_path / "t.txt").write_text("a " * 10)
    with pytest.raises(RecipeError, match=r"has 10 tokens, expected at least 256"):
        load_calibration(config, encoder, tmp_path / "t.txt")
    (tmp_path / "t.txt").write_text("a " * 600)
    first = load_calibration(config, encoder, tmp_path)
    assert first.tokens.shape == (2, LENGTH)
    assert (first.tokens[:, 0] == config.bos_token).all()
    assert load_calibration(config, encoder, tmp_path).digest == first.digest
