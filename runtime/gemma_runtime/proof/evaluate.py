"""Scores texts with a bundle, to tell what quantization costs each language.

Quantized graphs round the same tokens differently in other chunks, by as much as quantization
costs. So the chunks are fixed and even: every bundle is cut at the same positions. T positions, k
top tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import TokenizerError
from gemma_runtime.proof.agreement import Floats, bucketed_kl, left_over
from gemma_runtime.proof.goldens import log_softmax, log_sum_exp
from gemma_runtime.proof.language_figures import Divergence, Evaluation, ScoredText, summarize
from gemma_runtime.proof.teacher import TOP, TeacherSegment, load_teacher
from gemma_runtime.proof.texts import encode_segments
from gemma_runtime.session import Logits, Session, open_session
from gemma_runtime.text.tokenizer import Tokenizer, load_tokenizer

_CHUNK = 32  # positions scored per call; kernels round all even chunks up to 64 alike


def evaluate_bundle(
    bundle: Bundle,
    texts: dict[str, str] | None = None,
    threads: int | None = None,
    *,
    exact: bool = False,
    noise: bool = False,
) -> Evaluation:
    """Score `texts`, given by name, or the text that the bundle's teacher is for.

    `exact` takes the graph with float activations. `noise` scores all texts once more, token by
    token, to measure what rounding alone changes. Raises TokenizerError if there is no text.
    """
    manifest = bundle.manifest
    teachers = load_teacher(bundle.path("teacher")) if "teacher" in manifest.roles else {}
    if texts is None and not teachers:
        raise TokenizerError(
            f"{bundle.directory} has no evaluation text; give --text, or export with --eval-text"
        )
    tokenizer = load_tokenizer(bundle)
    tokens = {name: segment.tokens.tolist() for name, segment in teachers.items()}
    if texts is not None:
        encode, bos = tokenizer.encode, manifest.bos_token
        tokens = encode_segments(texts, encode, bos, manifest.context_length)
    with open_session(bundle, threads, exact) as session:
        scored = [
            score_text(session, tokenizer, name, ids, _teacher_of(teachers, name, ids), noise)
            for name, ids in tokens.items()
        ]
    return summarize(scored, exact=exact)


def score_text(
    session: Session,
    tokenizer: Tokenizer,
    name: str,
    tokens: list[int],
    teacher: TeacherSegment | None,
    noise: bool,
) -> ScoredText:
    """Score one text in fixed chunks, and with `noise` compare that with going token by token."""
    stepwise = _record(session, name, tokens) if noise else None
    following: list[Floats] = []
    from_teacher, from_stepwise = _Divergences(teacher), _Divergences(stepwise)
    for start, logits in _chunks(session, tokens, _CHUNK):
        following.append(_next_log_probs(tokens, start, logits))
        from_teacher.add(start, logits)
        from_stepwise.add(start, logits)
    log_probs = np.concatenate(following)
    size, characters = _text_size(tokenizer, tokens[1:])
    return ScoredText(
        name=name,
        next_log_probs=log_probs,
        bytes=size,
        characters=characters,
        teacher=from_teacher.divergence(log_probs),
        noise=from_stepwise.divergence(log_probs),
    )


def teacher_kl(logits: Logits, ids: NDArray[np.int32], log_p: NDArray[np.float32]) -> Floats:
    """KL(teacher ‖ logits), (T,), in nats, over k tokens and one bucket for all others."""
    log_q = log_softmax(logits)
    top_q = np.take_along_axis(log_q, ids, -1)  # (T, k)
    np.put_along_axis(log_q, ids, -np.inf, -1)
    return bucketed_kl(log_p.astype(np.float64), top_q, np.exp(log_q).sum(-1))


class _Divergences:
    """Collects the divergence from a reference, chunk by chunk; nothing without a reference."""

    def __init__(self, reference: TeacherSegment | None) -> None:
        self._reference = reference
        self._kl: list[Floats] = []
        self._same: list[NDArray[np.bool_]] = []

    def add(self, start: int, logits: Logits) -> None:
        if (reference := self._reference) is None:
            return
        span = slice(start, start + len(logits))
        self._kl.append(teacher_kl(logits, reference.ids[span], reference.log_probs[span]))
        self._same.append(logits.argmax(-1) == reference.ids[span, 0])

    def divergence(self, next_log_probs: Floats) -> Divergence | None:
        if (reference := self._reference) is None:
            return None
        return Divergence(
            reference_log_probs=reference.next_log_probs.astype(np.float64),
            next_log_probs=next_log_probs,
            kl=np.concatenate(self._kl),
            same=np.concatenate(self._same),
            rest=left_over(np.exp(reference.log_probs.astype(np.float64))),
        )


def _record(session: Session, name: str, tokens: list[int]) -> TeacherSegment:
    """What the bundle predicts when it is fed token by token, as in decoding."""
    ids, log_probs, following = [], [], []
    for start, logits in _chunks(session, tokens, 1):
        top = np.argpartition(logits[0], -min(TOP, logits.shape[1]))[-TOP:]
        top = top[np.argsort(-logits[0, top], kind="stable")]  # (k,), the likeliest first
        ids.append(top)
        log_probs.append(logits[0, top] - log_sum_exp(logits)[0])
        following.append(_next_log_probs(tokens, start, logits))
    return TeacherSegment(
        name=name,
        tokens=np.array(tokens, np.int32),
        ids=np.array(ids, np.int32),
        log_probs=np.array(log_probs, np.float32),
        next_log_probs=np.concatenate(following).astype(np.float32),
    )


def _chunks(session: Session, tokens: list[int], size: int) -> Iterator[tuple[int, Logits]]:
    """Where each chunk starts, and the logits after its tokens: (T, V)."""
    session.reset()
    for start in range(0, len(tokens), size):
        yield start, session.score(tokens[start : start + size])


def _next_log_probs(tokens: list[int], start: int, logits: Logits) -> Floats:
    """Log-probabilities of the tokens that follow; the text's last position has none."""
    after = np.array(tokens[start + 1 : start + 1 + len(logits)], np.int64)  # may be empty
    rows = logits[: len(after)]
    log_probs: Floats = rows[np.arange(len(after)), after] - log_sum_exp(rows)
    return log_probs


def _text_size(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[int, int]:
    """UTF-8 bytes and characters of tokens, whose last may end within a character."""
    text = b"".join(tokenizer.token_bytes(token) for token in tokens)
    return len(text), sum(byte & 0xC0 != 0x80 for byte in text)  # without continuation bytes


def _teacher_of(
    teachers: dict[str, TeacherSegment], name: str, tokens: list[int]
) -> TeacherSegment | None:
    """The stored segment with exactly these tokens; if several, the one with this name."""
    same = [t for t in teachers.values() if t.tokens.tolist() == tokens]
    return next((t for t in same if t.name == name), same[0] if same else None)
