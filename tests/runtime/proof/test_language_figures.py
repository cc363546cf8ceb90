"""Figures by language: what is pooled, what is the headline, how wide intervals are."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from gemma_runtime.proof.evaluation_table import render_evaluation
from gemma_runtime.proof.language_figures import Divergence, Evaluation, ScoredText, summarize


def scored(name: str, kl: float | None, *, positions: int = 161, seed: int = 0) -> ScoredText:
    """A text whose predictions differ from the teacher's by `kl` on average."""
    generator = np.random.default_rng(seed)
    reference = -generator.exponential(3, positions - 1)
    own = reference - generator.normal(0.05, 0.1, positions - 1)
    divergence = None
    if kl is not None:
        divergence = Divergence(
            reference_log_probs=reference,
            next_log_probs=own,
            kl=generator.exponential(kl, positions),
            same=generator.random(positions) < 0.9,
            rest=np.full(positions, 0.05),
        )
    return ScoredText(name, own, bytes=800, characters=400, teacher=divergence, noise=None)


def shown(evaluation: Evaluation) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(*render_evaluation("out/int8", evaluation), sep="\n")
    return console.export_text()


def test_the_worst_language_comes_first_and_is_the_headline() -> None:
    texts = [scored("de", 0.002), scored("hi", 0.04), scored("en", 0.001), scored("ru", 0.003)]
    evaluation = summarize(texts, exact=False)
    assert [text.name for text in evaluation.texts] == ["hi", "ru", "de", "en"]
    worst, first = evaluation.worst, evaluation.texts[0].teacher
    assert first is not None
    assert (worst.name, worst.measure, worst.value) == ("hi", "kl", first.kl.value)
    values = [text.teacher.kl.value for text in evaluation.texts if text.teacher is not None]
    assert worst.times_median == pytest.approx(values[0] / np.median(values))
    title = shown(evaluation).splitlines()[1]
    assert title.startswith(f"worst language: hi, KL {worst.value:.4f} [")
    assert f"{worst.times_median:.1f} times the median of 4" in title


def test_a_teacher_for_half_of_a_language_is_none() -> None:
    """Figures of the half would stand beside the perplexity of the whole."""
    evaluation = summarize([scored("hi/1", 0.01), scored("hi/2", None)], exact=False)
    assert evaluation.texts[0].teacher is None
    assert evaluation.note.startswith("perplexity only")


def test_without_a_teacher_bits_per_byte_decide() -> None:
    short = replace(scored("de", None), bytes=400)
    evaluation = summarize([scored("en", None), short], exact=True)
    assert evaluation.worst.name == "de"
    assert evaluation.worst.measure == "bits_per_byte"
    assert evaluation.worst.times_median == pytest.approx(4 / 3)
    assert "bits per byte" in shown(evaluation)
    assert "float activations" in shown(evaluation)


def test_intervals_hold_the_true_mean_and_narrow_with_more_text() -> None:
    """20 texts: an interval of 95 % misses the mean of 0.05 nats in about one of them."""
    hits, widths = 0, []
    for seed in range(20):
        teacher = summarize([scored("hi", 0.01, seed=seed)], exact=False).total.teacher
        assert teacher is not None
        assert teacher.ratio.low < teacher.ratio.value < teacher.ratio.high
        hits += teacher.ratio.low <= np.exp(0.05) <= teacher.ratio.high
        widths.append(teacher.ratio.high - teacher.ratio.low)
    assert hits >= 16
    long = summarize([scored("hi", 0.01, positions=1600)], exact=False).total.teacher
    assert long is not None
    assert long.ratio.high - long.ratio.low < 0.6 * min(widths)


def test_figures_of_a_text_are_those_of_its_positions() -> None:
    text = scored("de", 0.01)
    figures = summarize([text], exact=False).total
    assert figures.positions == 160
    assert figures.tokens_per_character == pytest.approx(160 / 400)
    assert figures.bits_per_byte == pytest.approx(-text.next_log_probs.sum() / np.log(2) / 800)
    assert figures.teacher is not None
    assert text.teacher is not None
    assert figures.teacher.ratio.value == pytest.approx(
        figures.perplexity / figures.teacher.perplexity
    )
    assert figures.teacher.kl.value == pytest.approx(text.teacher.kl.mean())
    assert "worst" not in shown(summarize([text], exact=False))
