"""Compares how two models react to the same prompts: what quantization changes in refusals.

Quantization can weaken refusals while accuracies stay (arXiv 2502.15799, 2506.20251), so they are
measured apart. Without generating: the log-odds of refusing against complying openings at the start
of the reply, and the KL divergence at its first token. With replies: refusals by their words.
n prompts, V vocabulary.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import IO

import numpy as np

from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import ContextFull, EvaluationError
from gemma_runtime.proof.agreement import Floats
from gemma_runtime.proof.goldens import log_softmax
from gemma_runtime.proof.paired import (
    Difference,
    count_flips,
    mcnemar,
    paired_difference,
    smallest_difference,
)
from gemma_runtime.proof.refusals import ENGLISH, Openings, is_refusal
from gemma_runtime.proof.safety_prompts import SafetyPrompt, check_ids
from gemma_runtime.session import Session, open_session
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.fork import Fork
from gemma_runtime.text.generate import generate_text
from gemma_runtime.text.tokenizer import Tokenizer, load_tokenizer

FEW = 30  # prompts; with fewer, a bootstrap interval is too narrow


@dataclass(frozen=True, slots=True)
class RefusalFigures:
    """Greedy replies that are refusals by their words: a lower bound."""

    a: int
    b: int
    lost: int  # a refuses, b doesn't
    new: int  # b refuses, a doesn't
    mcnemar_p: float
    smallest_change: float  # share of prompts; above 1 if there are too few


@dataclass(frozen=True, slots=True)
class KindFigures:
    """All harmful, or all harmless prompts. Log-odds are in nats; above 0 means refusing."""

    prompts: int
    log_odds_a: float  # mean
    log_odds_b: float
    change: Difference
    smallest_change: float  # that these prompts would find 4 times out of 5
    sign_changes: int
    mean_kl: float  # of b from a at the first token, over the whole vocabulary
    max_kl: float
    refusals: RefusalFigures | None


@dataclass(frozen=True, slots=True)
class PromptFigures:
    id: str
    harmless: bool
    log_odds_a: float
    log_odds_b: float
    kl: float
    reply_a: str | None
    reply_b: str | None
    refused_a: bool | None
    refused_b: bool | None


@dataclass(frozen=True, slots=True)
class SafetyComparison:
    a: str
    b: str
    digest_a: str  # `Bundle.digest`
    digest_b: str
    note: str  # what the two sides are
    harmful: KindFigures | None
    harmless: KindFigures | None
    prompts: tuple[PromptFigures, ...]
    openings: Openings


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two models."""

    bundle: Bundle
    tokenizer: Tokenizer
    exact: bool = False  # its graph with float activations

    @property
    def name(self) -> str:
        return f"{self.bundle.directory}" + (" (exact graph)" if self.exact else "")


@dataclass(frozen=True, slots=True)
class _Reaction:
    log_odds: float
    reply: str | None


def compare_safety(
    bundle: Bundle,
    other: Bundle | None,
    prompts: Sequence[SafetyPrompt],
    *,
    replies: int = 0,
    threads: int | None = None,
    openings: Openings = ENGLISH,
    on_progress: Callable[[str], None] = lambda text: None,
) -> SafetyComparison:
    """Compare two bundles, or a bundle's exact graph with the one that ships.

    `replies` is the number of tokens of each greedy reply; 0 generates none. One model is in
    memory at a time. Raises EvaluationError for bundles that encode prompts differently, and for
    fewer than two prompts of a kind.
    """
    a, b, note = _sides(bundle, other)
    _check_counts(prompts)
    tokens = _same_tokens(a, b, prompts)
    names = [prompt.id for prompt in prompts]

    def reactions(side: Side) -> Iterator[tuple[int, Floats, _Reaction]]:
        with open_session(side.bundle, threads, side.exact) as session:
            model = _Model(session, side, openings, replies)
            for index, ids in enumerate(tokens):
                on_progress(f"{side.name}: prompt {index + 1} of {len(tokens)}")
                yield index, *model.react(names[index], ids)

    before, figures = [], []
    with tempfile.TemporaryFile() as file:
        first = _Rows(file, a.bundle.manifest.vocab_size)
        for _, log_probs, reaction in reactions(a):
            first.append(log_probs)
            before.append(reaction)
        for index, log_probs, reaction in reactions(b):
            kl = _kl(first.read(index), log_probs)
            figures.append(_prompt_figures(prompts[index], before[index], reaction, kl))
    harmful, harmless = ([one for one in figures if one.harmless is kind] for kind in (False, True))
    return SafetyComparison(
        a=a.name,
        b=b.name,
        digest_a=a.bundle.digest(),
        digest_b=b.bundle.digest(),
        note=note,
        harmful=kind_figures(harmful) if harmful else None,
        harmless=kind_figures(harmless) if harmless else None,
        prompts=tuple(figures),
        openings=openings,
    )


def _check_counts(prompts: Sequence[SafetyPrompt]) -> None:
    check_ids(prompts)
    for kind in (False, True):
        found = [prompt.id for prompt in prompts if prompt.harmless is kind]
        if len(found) == 1:
            name = "harmless" if kind else "harmful"
            raise EvaluationError(
                f"{found[0]} is the only {name} prompt; give two or more, better {FEW}"
            )


class _Rows:
    """Rows of V numbers on disk, because one takes a megabyte."""

    def __init__(self, file: IO[bytes], length: int) -> None:
        self._file = file
        self._length = length

    def append(self, row: Floats) -> None:
        """Raises EvaluationError if the disk is full."""
        try:
            self._file.write(row.astype(np.float32).tobytes())
        except OSError as error:
            raise EvaluationError(
                f"can't write to {tempfile.gettempdir()}: {error.strerror}; free some space, or "
                "set TMPDIR to another folder"
            ) from error

    def read(self, index: int) -> Floats:
        size = 4 * self._length
        self._file.seek(index * size)
        return np.frombuffer(self._file.read(size), np.float32).astype(np.float64)


class _Model:
    """Reacts to one prompt after the other."""

    def __init__(self, session: Session, side: Side, openings: Openings, replies: int) -> None:
        self._session = session
        self._tokenizer = side.tokenizer
        self._stop_tokens = side.bundle.manifest.stop_tokens
        self._refusing = [self._tokenizer.encode(text) for text in openings.refusing]
        self._complying = [self._tokenizer.encode(text) for text in openings.complying]
        self._replies = replies

    def react(self, name: str, tokens: list[int]) -> tuple[Floats, _Reaction]:
        """Log-probabilities of the reply's first token, (V,), and the reaction."""
        self._check_room(name, len(tokens))
        fork, last = Fork(self._session, tokens[:-1]), tokens[-1]
        first = log_softmax(fork.back().score([last]))[0]
        refusing, complying = (
            np.logaddexp.reduce([self._log_prob(fork, last, opening) for opening in openings])
            for openings in (self._refusing, self._complying)
        )
        return first, _Reaction(float(refusing - complying), self._reply(fork, last))

    def _log_prob(self, fork: Fork, last: int, opening: list[int]) -> float:
        """Log-probability that the reply begins with these tokens."""
        rows = log_softmax(fork.back().score([last, *opening[:-1]]))  # (tokens, V)
        return float(rows[np.arange(len(opening)), opening].sum())

    def _reply(self, fork: Fork, last: int) -> str | None:
        if not self._replies:
            return None
        generation = generate_text(
            fork.back(),
            self._tokenizer,
            [last],
            max_new_tokens=self._replies,
            stop_tokens=self._stop_tokens,
        )
        return "".join(generation)

    def _check_room(self, name: str, length: int) -> None:
        longest = max(map(len, chain(self._refusing, self._complying)))
        needed, context = length + max(longest, self._replies), self._session.context_length
        if needed > context:
            raise ContextFull(
                f"prompt {name} needs {needed} tokens with its reply, the context holds {context}; "
                "shorten it, or export with a larger --context"
            )


def _sides(bundle: Bundle, other: Bundle | None) -> tuple[Side, Side, str]:
    tokenizer = load_tokenizer(bundle)
    if other is not None:
        note = "two bundles: a before, b after"
        return Side(bundle, tokenizer), Side(other, load_tokenizer(other)), note
    if "exact" not in bundle.manifest.graphs:
        raise EvaluationError(
            f"{bundle.directory} has no exact graph to compare with; give a second bundle, e.g. "
            "the same model exported with --quant none"
        )
    note = (
        "the same weights: a with float activations, b as it ships. This shows what the runtime's "
        "kernels change, not what quantization changes: for that give two bundles"
    )
    return Side(bundle, tokenizer, exact=True), Side(bundle, tokenizer), note


def _same_tokens(a: Side, b: Side, prompts: Sequence[SafetyPrompt]) -> list[list[int]]:
    """Each prompt as a user turn. Raises EvaluationError unless both sides agree on the ids."""
    tokens, others = ([*_encode(side, prompts)] for side in (a, b))
    sizes = {side.bundle.manifest.vocab_size for side in (a, b)}
    if len(sizes) > 1 or tokens != others:
        raise EvaluationError(
            f"{a.name} and {b.name} encode the prompts differently (another tokenizer or chat "
            "template), so nothing can be compared token by token; give two exports of one model"
        )
    return tokens


def _encode(side: Side, prompts: Sequence[SafetyPrompt]) -> Iterator[list[int]]:
    manifest = side.bundle.manifest
    for prompt in prompts:
        yield encode_chat(
            side.tokenizer,
            manifest.chat_template,
            [Message("user", prompt.text)],
            manifest.bos_token,
            manifest.eos_token,
        )


def _kl(log_p: Floats, log_q: Floats) -> float:
    """KL(p ‖ q) in nats over the vocabulary, both (V,)."""
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def _prompt_figures(prompt: SafetyPrompt, a: _Reaction, b: _Reaction, kl: float) -> PromptFigures:
    return PromptFigures(
        id=prompt.id,
        harmless=prompt.harmless,
        log_odds_a=a.log_odds,
        log_odds_b=b.log_odds,
        kl=kl,
        reply_a=a.reply,
        reply_b=b.reply,
        refused_a=None if a.reply is None else is_refusal(a.reply),
        refused_b=None if b.reply is None else is_refusal(b.reply),
    )


def kind_figures(prompts: list[PromptFigures]) -> KindFigures:
    a, b = (np.array([getattr(one, f"log_odds_{side}") for one in prompts]) for side in "ab")
    return KindFigures(
        prompts=len(prompts),
        log_odds_a=float(a.mean()),
        log_odds_b=float(b.mean()),
        change=paired_difference(a, b),
        smallest_change=smallest_difference(a, b),
        sign_changes=int((np.sign(a) != np.sign(b)).sum()),
        mean_kl=float(np.mean([one.kl for one in prompts])),
        max_kl=max(one.kl for one in prompts),
        refusals=_refusal_figures(prompts),
    )


def _refusal_figures(prompts: list[PromptFigures]) -> RefusalFigures | None:
    if prompts[0].refused_a is None:
        return None
    a, b = ([int(bool(getattr(one, f"refused_{side}"))) for one in prompts] for side in "ab")
    flips = count_flips(a, b)
    return RefusalFigures(
        a=sum(a),
        b=sum(b),
        lost=flips.lost,
        new=flips.won,
        mcnemar_p=mcnemar(flips.lost, flips.won),
        smallest_change=smallest_difference(a, b),
    )
