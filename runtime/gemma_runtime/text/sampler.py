"""Chooses a token from logits: greedily, or sampled with temperature, top-k, top-p and min-p.

The filters and their order are those of transformers' `generate`. V vocabulary, C candidates.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.errors import SessionError
from gemma_runtime.manifest import SamplingDefaults
from gemma_runtime.session import Logits

# The normal float32s: logits are multiplied and divided by it in that type.
_LEAST_PENALTY, _MOST_PENALTY = 2.0**-126, 2.0**128 - 2.0**104
_GREEDY = SamplingDefaults(0.0, 0, 1.0, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose a token. The defaults are greedy."""

    temperature: float = 0.0  # 0 is greedy and ignores top_k, top_p and min_p
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the fewest tokens whose probabilities sum to at least this
    min_p: float = 0.0  # keep tokens at least this likely relative to the most likely one
    repetition_penalty: float = 1.0  # https://arxiv.org/abs/1909.05858; 1 is no penalty
    seed: int | None = None  # None draws differently each time

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more")
        _check("top_k", self.top_k, self.top_k >= 0, "0 or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        in_range = _LEAST_PENALTY <= penalty <= _MOST_PENALTY
        _check("repetition_penalty", penalty, in_range, "a float32 above 0")
        if self.seed is not None:
            _check("seed", self.seed, self.seed >= 0, "0 or more")

    @classmethod
    def by_default(
        cls,
        defaults: SamplingDefaults | None,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> Self:
        """As the manifest says, greedy if it says nothing; each value given here replaces one."""
        base = _GREEDY if defaults is None else defaults
        return cls(
            temperature=base.temperature if temperature is None else temperature,
            top_k=base.top_k if top_k is None else top_k,
            top_p=base.top_p if top_p is None else top_p,
            min_p=base.min_p if min_p is None else min_p,
            repetition_penalty=(
                base.repetition_penalty if repetition_penalty is None else repetition_penalty
            ),
            seed=seed,
        )


class Sampler:
    """Chooses tokens. With a seed, the same logits give the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def pick(
        self, logits: Logits, previous: Sequence[int], allowed: NDArray[np.intp] | None = None
    ) -> int:
        """Choose one token from `logits`, (V,). `previous` is all tokens so far, with the prompt.

        If `allowed` is given, (A,), the others are dropped before any filter.
        Raises SessionError if the largest logit is Inf or NaN.
        """
        penalized = _penalize(logits, previous, self._sampling.repetition_penalty)
        if allowed is None:
            return self._pick(penalized)
        return int(allowed[self._pick(penalized[allowed])])

    def _pick(self, logits: Logits) -> int:
        if self._sampling.temperature == 0:
            return _best(logits)
        tokens, weights = _candidates(logits, self._sampling)
        sums = weights.cumsum()  # (C,)
        index = int(sums.searchsorted(self._random.random() * sums[-1], side="right"))
        return int(tokens[min(index, len(tokens) - 1)])


def distribution(
    logits: Logits, previous: Sequence[int], sampling: Sampling
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The candidate tokens, most likely first, and their probabilities: (C,) each.

    `sampling.temperature` must not be 0.
    """
    penalized = _penalize(logits, previous, sampling.repetition_penalty)
    tokens, weights = _candidates(penalized, sampling)
    order = np.argsort(-weights, kind="stable")
    return tokens[order], weights[order] / weights.sum()


def _candidates(logits: Logits, sampling: Sampling) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The candidate tokens and their weights, (C,) each. The most likely token's weight is 1."""
    tokens = _top_k(logits, sampling.top_k)  # the temperature doesn't change the order
    scores = logits[tokens].astype(np.float64)
    with np.errstate(over="ignore"):  # a temperature near 0 gives all other tokens exp(-inf)
        weights = np.exp((scores - scores.max()) / sampling.temperature)
    if sampling.top_p < 1:
        tokens, weights = _top_p(tokens, weights, sampling.top_p)
    if sampling.min_p > 0:
        likely = weights >= sampling.min_p
        tokens, weights = tokens[likely], weights[likely]
    return tokens, weights


def _check(name: str, value: float, is_valid: bool, expected: str) -> None:
    if not is_valid:
        raise SessionError(f"{name} is {value}, expected {expected}")


def _best(logits: Logits) -> int:
    token = int(logits.argmax())
    _check_number(float(logits[token]))  # argmax stops at a NaN
    return token


def _penalize(logits: Logits, previous: Sequence[int], penalty: float) -> Logits:
    """Apply the repetition penalty once to every token in `previous`."""
    if penalty == 1 or len(previous) == 0:
        return logits
    logits = logits.copy()
    seen = np.unique(np.asarray(previous, np.int64))
    seen = seen[seen < len(logits)]
    scores = logits[seen]
    factor = np.float32(penalty)
    with np.errstate(over="ignore"):  # -inf is never drawn, inf is refused
        logits[seen] = np.where(scores < 0, scores * factor, scores / factor)
    return logits


def _top_k(logits: Logits, k: int) -> NDArray[np.intp]:
    """Tokens at least as likely as the k-th: more than k if some tie with it."""
    _check_number(float(logits.max()))
    if k == 0 or k >= len(logits):
        return np.arange(len(logits))
    return np.flatnonzero(logits >= np.partition(logits, -k)[-k])


def _top_p(
    tokens: NDArray[np.intp], weights: NDArray[np.float64], top_p: float
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The fewest most likely tokens that hold `top_p` of the total weight; at least one."""
    total = weights.sum()
    # Tokens rarer than this hold at most 1 - top_p even all together, so only the others have to
    # be sorted.
    common = np.flatnonzero(weights >= (1 - top_p) * total / len(weights))
    common = common[np.argsort(-weights[common], kind="stable")]
    above = weights[common].cumsum() - weights[common]  # weight of all more likely tokens
    kept = common[: max(1, int((above < top_p * total).sum()))]
    return tokens[kept], weights[kept]


def _check_number(best: float) -> None:
    if not math.isfinite(best):
        raise SessionError(
            f"the largest logit is {best}: the model overflows; run gemma-runtime verify on the "
            "bundle"
        )
