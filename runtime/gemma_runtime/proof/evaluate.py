"""Evaluates a bundle on a text: perplexity, and KL divergence from the float32 teacher.

The figures are llama.cpp's, for every segment. T positions, k top tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import TokenizerError
from gemma_runtime.proof.agreement import Floats, bucketed_kl, left_over
from gemma_runtime.proof.goldens import log_sum_exp
from gemma_runtime.proof.teacher import TeacherSegment, encode_segments, load_teacher
from gemma_runtime.session import Logits, Session, open_session
from gemma_runtime.text.tokenizer import load_tokenizer

_HEADINGS = ("", "tokens", "perplexity", "teacher", "mean KL", "median", "p99", "top-1", "rest")
_CHUNK = 32  # positions scored per call, to bound the memory of their logits


@dataclass(frozen=True, slots=True)
class TeacherFigures:
    """Comparison with the teacher's stored probabilities. KL is in nats.

    KL is over the teacher's top tokens and one bucket for all others. It is at most the true KL,
    and below it by `rest` times the divergence within the bucket.
    """

    perplexity: float  # the teacher's own
    mean_kl: float
    median_kl: float
    p99_kl: float
    top1: float  # share of positions with the same most likely token: llama.cpp's "same top p"
    rest: float  # the teacher's probability of the bucket, averaged over positions


@dataclass(frozen=True, slots=True)
class SegmentFigures:
    name: str
    positions: int
    perplexity: float
    teacher: TeacherFigures | None  # None if the bundle has no teacher for this text


@dataclass(frozen=True, slots=True)
class Evaluation:
    total: SegmentFigures  # over the positions of all segments
    segments: tuple[SegmentFigures, ...]
    note: str  # tells for which segments the bundle has a teacher


@dataclass(frozen=True, slots=True)
class _MeasuredSegment:
    name: str
    next_log_probs: Floats  # (T - 1,)
    teacher: TeacherSegment | None
    kl: Floats  # (T,), empty without a teacher
    same: NDArray[np.bool_]  # (T,), whether the most likely token is the teacher's


def evaluate_bundle(
    bundle: Bundle, texts: dict[str, str] | None = None, threads: int | None = None
) -> Evaluation:
    """Score `texts`, given by name, or the text that the bundle's teacher is for.

    Raises TokenizerError if there is neither.
    """
    stored = "teacher" in bundle.manifest.roles
    teachers = load_teacher(bundle.path("teacher")) if stored else {}
    if texts is None and not teachers:
        raise TokenizerError(
            f"{bundle.directory} has no evaluation text; give --text, or export with --eval-text"
        )
    tokens = {name: segment.tokens.tolist() for name, segment in teachers.items()}
    if texts is not None:
        manifest = bundle.manifest
        encode = load_tokenizer(bundle).encode
        tokens = encode_segments(texts, encode, manifest.bos_token, manifest.context_length)
    with open_session(bundle, threads) as session:
        measured = [
            _measure(session, name, ids, _teacher_of(teachers, name, ids))
            for name, ids in tokens.items()
        ]
    return summarize(measured)


def summarize(measured: Sequence[_MeasuredSegment]) -> Evaluation:
    with_teacher = [segment for segment in measured if segment.teacher is not None]
    if len(with_teacher) == len(measured):
        note = "against the float32 teacher's stored probabilities"
    elif with_teacher:
        note = f"{len(with_teacher)} of {len(measured)} segments have a teacher"
    else:
        note = "perplexity only: the bundle has no teacher for this text, see --eval-text"
    return Evaluation(
        total=_figures("total", measured),
        segments=tuple(_figures(segment.name, [segment]) for segment in measured),
        note=note,
    )


def render_evaluation(name: str, evaluation: Evaluation) -> Table:
    table = Table(title=name, title_justify="left", box=None, caption=evaluation.note)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right" if heading else "left")
    for figures in (*evaluation.segments, evaluation.total):
        table.add_row(figures.name, str(figures.positions), *_cells(figures))
    return table


def teacher_kl(logits: Logits, ids: NDArray[np.int32], log_p: NDArray[np.float32]) -> Floats:
    """KL(teacher ‖ logits), (T,), in nats, over k tokens and one bucket for all others."""
    log_q = logits - log_sum_exp(logits)[:, None]  # (T, V) float64
    top_q = np.take_along_axis(log_q, ids, -1)  # (T, k)
    np.put_along_axis(log_q, ids, -np.inf, -1)
    return bucketed_kl(log_p.astype(np.float64), top_q, np.exp(log_q).sum(-1))


def _measure(
    session: Session, name: str, tokens: list[int], teacher: TeacherSegment | None
) -> _MeasuredSegment:
    session.reset()
    following, kl, same = [], [np.empty(0)], [np.empty(0, np.bool_)]
    for start in range(0, len(tokens), _CHUNK):
        logits = session.score(tokens[start : start + _CHUNK])  # (T, V)
        after = np.array(tokens[start + 1 : start + 1 + len(logits)], np.int64)  # may be empty
        rows = logits[: len(after)]
        following.append(rows[np.arange(len(after)), after] - log_sum_exp(rows))
        if teacher is not None:
            span = slice(start, start + len(logits))
            kl.append(teacher_kl(logits, teacher.ids[span], teacher.log_probs[span]))
            same.append(logits.argmax(-1) == teacher.ids[span, 0])
    return _MeasuredSegment(
        name, np.concatenate(following), teacher, np.concatenate(kl), np.concatenate(same)
    )


def _teacher_of(
    teachers: dict[str, TeacherSegment], name: str, tokens: list[int]
) -> TeacherSegment | None:
    """The stored segment with exactly these tokens; if several, the one with this name."""
    same = [t for t in teachers.values() if t.tokens.tolist() == tokens]
    return next((t for t in same if t.name == name), same[0] if same else None)


def _figures(name: str, parts: Sequence[_MeasuredSegment]) -> SegmentFigures:
    return SegmentFigures(
        name=name,
        positions=sum(len(part.next_log_probs) for part in parts),
        perplexity=_perplexity([part.next_log_probs for part in parts]),
        teacher=_teacher_figures([part for part in parts if part.teacher is not None]),
    )


def _teacher_figures(parts: Sequence[_MeasuredSegment]) -> TeacherFigures | None:
    teachers = [part.teacher for part in parts if part.teacher is not None]
    if not teachers:
        return None
    kl = np.concatenate([part.kl for part in parts])
    return TeacherFigures(
        perplexity=_perplexity([t.next_log_probs for t in teachers]),
        mean_kl=float(kl.mean()),
        median_kl=float(np.median(kl)),
        p99_kl=float(np.quantile(kl, 0.99)),
        top1=float(np.concatenate([part.same for part in parts]).mean()),
        rest=float(np.concatenate([_bucket(t.log_probs) for t in teachers]).mean()),
    )


def _perplexity(log_probs: Sequence[NDArray[np.floating]]) -> float:
    return float(np.exp(-np.concatenate(log_probs).mean(dtype=np.float64)))


def _bucket(log_probs: NDArray[np.float32]) -> Floats:
    return left_over(np.exp(log_probs.astype(np.float64)))


def _cells(figures: SegmentFigures) -> tuple[str, ...]:
    teacher = figures.teacher
    if teacher is None:
        return (f"{figures.perplexity:.2f}", *("",) * 6)
    return (
        f"{figures.perplexity:.2f}",
        f"{teacher.perplexity:.2f}",
        f"{teacher.mean_kl:.4f}",
        f"{teacher.median_kl:.4f}",
        f"{teacher.p99_kl:.3f}",
        f"{teacher.top1:.1%}",
        f"{teacher.rest:.1%}",
    )
