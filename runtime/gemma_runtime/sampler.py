"""From logits to a token: greedy, or drawn by temperature, top-k, top-p and min-p.

Filters and their order are those of transformers' `generate`. V vocabulary, C candidates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.errors import SessionError
from gemma_runtime.session import Logits

_FIRST_GUESS = 1024  # candidates that nearly always hold the top-p mass


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose a token. The defaults are greedy."""

    temperature: float = 0.0  # 0 is greedy: the filters below don't matter then
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the fewest tokens that hold this share of probability
    min_p: float = 0.0  # keep tokens at least this likely relative to the best
    repetition_penalty: float = 1.0  # https://arxiv.org/abs/1909.05858; 1 is none
    seed: int | None = None  # None draws differently each time

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more")
        _check("top_k", self.top_k, self.top_k >= 0, "0 or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0 < penalty < math.inf, "more than 0")
        if self.seed is not None:
            _check("seed", self.seed, self.seed >= 0, "0 or more")


class Sampler:
    """Chooses tokens. With a seed, the same logits give the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def pick(self, logits: Logits, previous: Sequence[int]) -> int:
        """One token by its logits, (V,); `previous` are the tokens so far, prompt included."""
        if self._sampling.temperature == 0:
            return _best(_penalize(logits, previous, self._sampling.repetition_penalty))
        tokens, shares = distribution(logits, previous, self._sampling)
        sums = shares.cumsum()  # (C,)
        at = int(sums.searchsorted(self._random.random() * sums[-1], side="right"))
        return int(tokens[min(at, len(tokens) - 1)])


def distribution(
    logits: Logits, previous: Sequence[int], sampling: Sampling
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Tokens that may be drawn and their probabilities, most likely first, (C,) each.

    The temperature must not be 0.
    """
    penalized = _penalize(logits, previous, sampling.repetition_penalty)
    scores = penalized.astype(np.float64) / sampling.temperature  # (V,)
    tokens = _top_k(scores, sampling.top_k)
    kept = scores[tokens]
    if sampling.top_p < 1:
        tokens, kept = _top_p(tokens, kept, sampling.top_p)
    if sampling.min_p > 0:
        likely = kept >= kept.max() + math.log(sampling.min_p)
        tokens, kept = tokens[likely], kept[likely]
    order = np.argsort(-kept, kind="stable")
    shares = np.exp(kept[order] - kept[order[0]])  # (C,)
    return tokens[order], shares / shares.sum()


def _check(name: str, value: float, right: bool, expected: str) -> None:
    if not right:
        raise SessionError(f"{name} is {value}, expected {expected}")


def _best(logits: Logits) -> int:
    token = int(logits.argmax())
    _check_number(float(logits[token]))  # argmax stops at a NaN
    return token


def _penalize(logits: Logits, previous: Sequence[int], penalty: float) -> Logits:
    """Make tokens that were there before less likely, each once."""
    if penalty == 1 or len(previous) == 0:
        return logits
    logits = logits.copy()
    seen = np.unique(np.asarray(previous, np.int64))
    seen = seen[seen < len(logits)]
    scores = logits[seen]
    factor = np.float32(penalty)
    logits[seen] = np.where(scores < 0, scores * factor, scores / factor)
    return logits


def _top_k(scores: NDArray[np.float64], k: int) -> NDArray[np.intp]:
    """Tokens no less likely than the k-th; more than k where they tie."""
    _check_number(float(scores.max()))
    if k == 0 or k >= len(scores):
        return np.arange(len(scores))
    return np.flatnonzero(scores >= np.partition(scores, -k)[-k])


def _top_p(
    tokens: NDArray[np.intp], scores: NDArray[np.float64], top_p: float
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The fewest most likely tokens that hold a share of `top_p`; at least one."""
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()  # (C,)
    guess = _FIRST_GUESS
    while True:
        best = _largest(shares, guess)
        above = shares[best].cumsum() - shares[best]  # held by the more likely ones
        count = max(1, int((above < top_p).sum()))
        if count < len(best) or len(best) == len(shares):
            return tokens[best[:count]], scores[best[:count]]
        guess *= 8


def _largest(shares: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Where the largest `count` are, largest first."""
    if count >= len(shares):
        return np.argsort(-shares, kind="stable")
    part = np.argpartition(-shares, count)[:count]
    return part[np.argsort(-shares[part], kind="stable")]


def _check_number(best: float) -> None:
    if not math.isfinite(best):
        raise SessionError(
            f"the largest logit is {best}: the artifact overflows; run gemma-runtime verify on it"
        )
