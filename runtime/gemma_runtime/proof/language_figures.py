"""Figures of scored texts, language by language, the worst first. T positions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.proof.agreement import Floats
from gemma_runtime.proof.paired import paired_difference
from gemma_runtime.proof.texts import language_of

_BLOCK = 8  # positions drawn together by the bootstrap, since neighbours are alike


@dataclass(frozen=True, slots=True)
class Divergence:
    """How one text's predictions differ from a reference's."""

    reference_log_probs: Floats  # (T - 1,), of the token that does follow
    next_log_probs: Floats  # (T - 1,)
    kl: Floats  # (T,)
    same: NDArray[np.bool_]  # (T,), whether the most likely token is the reference's
    rest: Floats  # (T,), the reference's probability of the tokens that KL counts as one


@dataclass(frozen=True, slots=True)
class ScoredText:
    name: str
    next_log_probs: Floats  # (T - 1,)
    bytes: int  # of UTF-8, without bos
    characters: int
    teacher: Divergence | None  # from the float32 model; None if the bundle has none for this text
    noise: Divergence | None  # from the bundle itself, fed token by token


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval: a percentile bootstrap over blocks of 8 positions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class DivergenceFigures:
    """Comparison with a reference. KL is in nats.

    KL is over the reference's top tokens and one bucket for all others. It is at most the true KL,
    and below it by `rest` times the divergence within the bucket.
    """

    perplexity: float  # the reference's own
    ratio: Estimate  # of the perplexities: above 1 is a loss
    kl: Estimate  # mean over positions
    median_kl: float
    p99_kl: float
    top1: float  # share of positions with the same most likely token: llama.cpp's "same top p"
    rest: float  # the reference's probability of the bucket, averaged over positions


@dataclass(frozen=True, slots=True)
class TextFigures:
    name: str  # a language, or a text
    positions: int
    tokens_per_character: float
    bits_per_byte: float
    perplexity: float
    teacher: DivergenceFigures | None  # None unless the bundle has a teacher for all of it
    noise: DivergenceFigures | None


@dataclass(frozen=True, slots=True)
class Worst:
    name: str
    measure: str  # "kl" or, without a teacher, "bits_per_byte"
    value: float
    times_median: float  # of all languages


@dataclass(frozen=True, slots=True)
class Evaluation:
    worst: Worst
    texts: tuple[TextFigures, ...]  # the worst first
    total: TextFigures  # over the positions of all texts
    exact: bool  # whether activations were float
    note: str  # tells for which texts the bundle has a teacher


def summarize(scored: Sequence[ScoredText], *, exact: bool) -> Evaluation:
    """Figures of each language (see `language_of`), and of all together."""
    by_language = sorted(scored, key=_language)
    texts = [_figures(name, list(parts)) for name, parts in groupby(by_language, _language)]
    texts.sort(key=_loss, reverse=True)
    return Evaluation(
        worst=_worst(texts),
        texts=tuple(texts),
        total=_figures("total", scored),
        exact=exact,
        note=_note(texts),
    )


def _language(text: ScoredText) -> str:
    return language_of(text.name)


def _loss(figures: TextFigures) -> tuple[bool, float]:
    """What languages are ordered by: KL, after them bits per byte of those without a teacher."""
    teacher = figures.teacher
    return (False, figures.bits_per_byte) if teacher is None else (True, teacher.kl.value)


def _worst(texts: Sequence[TextFigures]) -> Worst:
    has_teacher, value = _loss(texts[0])
    comparable = [loss for has, loss in map(_loss, texts) if has == has_teacher]
    return Worst(
        name=texts[0].name,
        measure="kl" if has_teacher else "bits_per_byte",
        value=value,
        times_median=value / max(float(np.median(comparable)), 1e-12),
    )


def _note(texts: Sequence[TextFigures]) -> str:
    count = sum(text.teacher is not None for text in texts)
    if count == len(texts):
        return "against the float32 teacher's stored probabilities"
    if count:
        return f"{count} of {len(texts)} texts have a teacher"
    return "perplexity only: the bundle has no teacher for this text, see --eval-text"


def _figures(name: str, parts: Sequence[ScoredText]) -> TextFigures:
    log_probs = np.concatenate([part.next_log_probs for part in parts])
    return TextFigures(
        name=name,
        positions=len(log_probs),
        tokens_per_character=len(log_probs) / max(1, sum(part.characters for part in parts)),
        bits_per_byte=float(-log_probs.sum() / np.log(2)) / max(1, sum(p.bytes for p in parts)),
        perplexity=_perplexity(log_probs),
        teacher=_divergence_figures([part.teacher for part in parts]),
        noise=_divergence_figures([part.noise for part in parts]),
    )


def _divergence_figures(parts: Sequence[Divergence | None]) -> DivergenceFigures | None:
    given = [part for part in parts if part is not None]
    if len(given) < len(parts):
        return None

    def joined(values: Callable[[Divergence], Floats]) -> Floats:
        return np.concatenate([values(part) for part in given])

    kl, reference = joined(lambda part: part.kl), joined(lambda part: part.reference_log_probs)
    change = _estimate([part.reference_log_probs - part.next_log_probs for part in given])
    return DivergenceFigures(
        perplexity=_perplexity(reference),
        ratio=Estimate(*(float(np.exp(x)) for x in (change.value, change.low, change.high))),
        kl=_estimate([part.kl for part in given]),
        median_kl=float(np.median(kl)),
        p99_kl=float(np.quantile(kl, 0.99)),
        top1=float(np.concatenate([part.same for part in given]).mean()),
        rest=float(joined(lambda part: part.rest).mean()),
    )


def _estimate(parts: Sequence[Floats]) -> Estimate:
    """The mean over all positions; blocks don't reach from one text into the next."""
    blocks = [(text, i // _BLOCK) for text, part in enumerate(parts) for i in range(len(part))]
    values = np.concatenate(parts)
    return Estimate(*paired_difference(np.zeros(len(values)), values, blocks))


def _perplexity(log_probs: Floats) -> float:
    return float(np.exp(-log_probs.mean()))
