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
        tokens, shares = _candidates(logits, previous, self._sampling)
        sums = shares.cumsum()  # (C,)
        at = int(sums.searchsorted(self._random.random() * sums[-1], side="right"))
        return int(tokens[min(at, len(tokens) - 1)])


def distribution(
    logits: Logits, previous: Sequence[int], sampling: Sampling
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Tokens that may be drawn and their probabilities, most likely first, (C,) each.

    The temperature must not be 0.
    """
    tokens, shares = _candidates(logits, previous, sampling)
    order = np.argsort(-shares, kind="stable")
    return tokens[order], shares[order] / shares.sum()


def _candidates(
    logits: Logits, previous: Sequence[int], sampling: Sampling
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Tokens that may be drawn and their likelihood relative to the best, (C,) each."""
    penalized = _penalize(logits, previous, sampling.repetition_penalty)
    tokens = _top_k(penalized, sampling.top_k)  # the temperature keeps the order
    scores = penalized[tokens].astype(np.float64)
    with np.errstate(over="ignore"):  # near 0 a temperature leaves the best alone: exp(-inf)
        shares = np.exp((scores - scores.max()) / sampling.temperature)
    if sampling.top_p < 1:
        tokens, shares = _top_p(tokens, shares, sampling.top_p)
    if sampling.min_p > 0:
        likely = shares >= sampling.min_p
        tokens, shares = tokens[likely], shares[likely]
    return tokens, shares


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


def _top_k(logits: Logits, k: int) -> NDArray[np.intp]:
    """Tokens no less likely than the k-th; more than k where they tie."""
    _check_number(float(logits.max()))
    if k == 0 or k >= len(logits):
        return np.arange(len(logits))
    return np.flatnonzero(logits >= np.partition(logits, -k)[-k])


def _top_p(
    tokens: NDArray[np.intp], shares: NDArray[np.float64], top_p: float
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The fewest most likely tokens that hold `top_p` of the whole; at least one."""
    whole = shares.sum()
    # Even all tokens together, each this rare, are no more than what may be left out: only the
    # others have to be sorted.
    common = np.flatnonzero(shares >= (1 - top_p) * whole / len(shares))
    common = common[np.argsort(-shares[common], kind="stable")]
    above = shares[common].cumsum() - shares[common]  # held by the more likely ones
    kept = common[: max(1, int((above < top_p * whole).sum()))]
    return tokens[kept], shares[kept]


def _check_number(best: float) -> None:
    if not math.isfinite(best):
        raise SessionError(
            f"the largest logit is {best}: the artifact overflows; run gemma-runtime verify on it"
        )
