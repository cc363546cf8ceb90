"""Calibrated rounding: GPTQ compared with a naive version, layer by layer, and resumed work."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gemma_export.formats.codes import dequantize, unpack
from gemma_export.formats.format import Format
from gemma_export.model.config import TABLE
from gemma_export.progress import unheard
from gemma_export.quantize.calibrate import layer_weights
from gemma_export.quantize.calibrate.fisher import weigh_table
from gemma_export.quantize.calibrate.gptq import gptq, inverse_factor, prepare, weighted_scales
from gemma_export.quantize.calibrate.layers import calibrate, calibrate_table
from gemma_export.quantize.calibrate.stream import pass_layers
from gemma_export.quantize.calibrate.text import LENGTH, default_texts, load_calibration
from gemma_export.quantize.calibrate.workspace import Workspace
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.round import round_rows, shared_scale
from gemma_export.quantize.store import open_or_build_store
from gemma_runtime.errors import RecipeError
from tests.export.conftest import (
    RandomText,
    TinyCheckpoint,
    calibrated_store,
    head_inputs,
    only,
    store_divergence,
)
from tests.export.models import E2B, GEMMA2, GEMMA4S, TINIES, UNNORMED

FORMATS = (Format(4), Format(4, asymmetric=True), Format(8))


def _layer(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random weights, and the Gram matrix of correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, width, generator=draw) @ torch.randn(width, width, generator=draw)
    return torch.randn(rows, width, generator=draw), inputs.T @ inputs / 400


def _error(weights: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """Squared error of the matrix products, averaged over the inputs."""
    error = weights - rounded
    return float(((error @ gram) * error).sum())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_gptq_has_a_smaller_error_on_the_calibration_inputs_than_rounding(
    fmt: Format,
) -> None:
    weights, gram = _layer(24, 128)
    calibrated = _error(weights, dequantize(gptq(weights, prepare(gram), fmt), fmt), gram)
    searched = round_rows(weights, fmt, "searched")
    assert calibrated < 0.5 * _error(weights, dequantize(searched, fmt), gram)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_gptq_gives_the_codes_of_the_paper_s_greedy_algorithm(fmt: Format) -> None:
    """Here naively: after each column, least squares solves for the others, without Cholesky."""
    weights, gram = _layer(3, 64)
    order = torch.argsort(gram.diagonal(), descending=True)
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(64)
    importance = damped.inverse().diagonal().reciprocal().float().view(-1, fmt.group)
    scale, zero = weighted_scales(weights.view(3, -1, fmt.group), importance, fmt)
    current, codes = weights.double().clone(), torch.zeros(3, 64, dtype=torch.uint8)
    for index, column in enumerate(order.tolist()):
        s, z = (
            scale[:, column // fmt.group].double(),
            zero[:, column // fmt.group].double(),
        )
        code = (current[:, column] / s).round().add(z).clamp(0, (1 << fmt.bits) - 1)
        codes[:, column] = code.to(torch.uint8)
        remaining = order[index + 1 :]
        error = current[:, column] - (code - z) * s
        if len(remaining):
            update = torch.linalg.solve(damped[remaining][:, remaining], damped[remaining, column])
            current[:, remaining] += error[:, None] * update
    block = gptq(weights, prepare(gram), fmt, refined=0)
    same = unpack(block.codes, fmt.bits, 64) == codes
    assert same.float().mean() > 0.99  # a few differ because of ties in float32
    assert torch.equal(block.scales.float(), scale)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_refinement_lowers_the_error_and_its_scales_are_exact_in_float16_and_bfloat16(
    fmt: Format,
) -> None:
    weights, gram = _layer(24, 128)
    inputs = prepare(gram)
    greedy, refined = (gptq(weights, inputs, fmt, refined=times) for times in (0, 3))
    before, after = (_error(weights, dequantize(block, fmt), gram) for block in (greedy, refined))
    assert after < 0.95 * before
    assert torch.equal(refined.scales.float(), shared_scale(refined.scales.float()))


def test_the_factor_is_the_cholesky_factor_of_the_inverse() -> None:
    _, gram = _layer(1, 32)
    order = torch.arange(31, -1, -1)
    factor = inverse_factor(gram, order, 0.01)
    damped = gram[order][:, order] + 0.01 * torch.eye(32)
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(32), atol=1e-2)
    assert torch.equal(factor, factor.triu())


def test_columns_whose_inputs_are_always_zero_are_rounded_too() -> None:
    weights, gram = _layer(4, 64)
    gram[:, 5] = gram[5] = 0
    rounded = dequantize(gptq(weights, prepare(gram), Format(4)), Format(4))
    assert torch.isfinite(rounded).all()


@pytest.fixture
def work(random_text: RandomText) -> Workspace:
    return random_text("int4-gptq", 8)


@only(*TINIES, *UNNORMED, *GEMMA4S)
def test_streaming_one_layer_at_a_time_gives_the_logits_of_transformers(
    tiny: TinyCheckpoint, work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_weights, "product_dtype", lambda device: torch.float32)
    config, tokens = work.checkpoint.config, work.calibration.tokens
    gain = work.checkpoint.rows("model.norm.weight", 0, config.hidden_size)
    pass_layers(work, work.teacher_residuals, unheard)
    hidden = head_inputs(work.teacher_residuals.last, config, gain)
    logits = hidden @ work.checkpoint.rows(TABLE, 0, config.vocab_size).T
    if config.final_softcap is not None:
        logits = config.final_softcap * (logits / config.final_softcap).tanh()
    with torch.inference_mode():
        expected = tiny.model(input_ids=tokens).logits
    assert (logits.view_as(expected) - expected).abs().max() < 2e-5


@only(*TINIES, *UNNORMED, *GEMMA4S)
def test_a_calibrated_model_has_a_smaller_kl_than_a_searched_one(work: Workspace) -> None:
    store = calibrated_store(work)
    searched = open_or_build_store(work.checkpoint, find_recipe("int4"))
    assert store_divergence(work, store) < store_divergence(work, searched)


@only(GEMMA2, E2B)
def test_interrupted_calibration_resumes_and_gives_the_same_codes(
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
    resumed = calibrated_store(work, lambda name, done: again.append(name)).codes_digest
    assert "layer 0" not in again
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path / "other"))
    assert calibrated_store(work).codes_digest == resumed


def test_the_calibration_text_shares_no_eight_words_with_the_evaluation_text() -> None:
    evaluated = Path(__file__).parents[4].joinpath("benchmarks", "text.txt").read_text("utf-8")
    calibrated = {run for text in default_texts() for run in _eight_words(text)}
    assert len(calibrated) > 10_000
    shared = calibrated & set(_eight_words(evaluated))
    assert not shared, sorted(shared)[:3]


def _eight_words(text: str) -> list[str]:
    """All runs of eight words. Languages without spaces give few, but the two texts share none."""
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
