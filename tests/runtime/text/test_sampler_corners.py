"""The sampler at the ends of float32 and of its own settings, and its seeds.

The tokens of a seed are part of what a bundle's user sees. They are written down here, and numpy's
generator is computed once more in plain Python: no version of numpy may change them.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from typing import Any

import numpy as np
import pytest

from gemma_runtime.errors import SessionError
from gemma_runtime.session import FakeSession, Logits
from gemma_runtime.text.generate import generate
from gemma_runtime.text.sampler import Sampler, Sampling, distribution

MAX = float(np.finfo(np.float32).max)
DENORMAL = float(np.finfo(np.float32).smallest_subnormal)
LOGITS = {
    "±1e4": [-1e4, 1e4, 9.99e3, 0.0],
    "a softcap's": [-30.0, 30.0, 30.0, 29.99],
    "float16's": [-65504.0, 65504.0, 65472.0, 1.0],
    "float32's": [-MAX, MAX, MAX, 0.0],
    "masked": [-np.inf, 1e4, -np.inf, -1e4],
    "denormal": [-DENORMAL, DENORMAL, 0.0, 0.0],
    "negative": [-MAX, -1e30, -1e30, -np.inf],
}
SEEN = (0, 1, 3)  # tokens that a penalty is for
TEMPERATURES = (5e-324, 1e-300, 1e-7, 1.0, 1e7, 1e300, 1.7976931348623157e308)
FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"top_p": 0.9},
    {"top_k": 2, "min_p": 0.05},
    {"top_p": 1e-9, "min_p": 1.0},
)


@pytest.mark.parametrize("name", LOGITS)
def test_every_temperature_gives_probabilities_and_a_token(name: str) -> None:
    """Warnings are errors, so nothing overflows on the way either."""
    logits = np.array(LOGITS[name], np.float32)
    best = np.flatnonzero(logits == logits.max())
    for temperature, filters in product(TEMPERATURES, FILTERS):
        sampling = Sampling(temperature, **filters, seed=3)
        tokens, shares = distribution(logits, [], sampling)
        assert np.isfinite(shares).all()
        assert shares.sum() == pytest.approx(1)
        sampler = Sampler(sampling)
        drawn = {sampler.pick(logits, []) for _ in range(20)}
        assert drawn <= set(tokens.tolist())
        assert not np.isinf(logits[[*drawn]]).any()
        if temperature <= 1e-300 and name != "denormal":
            assert drawn <= set(best.tolist())


def test_a_huge_temperature_draws_all_tokens_alike() -> None:
    logits = np.array([-MAX, MAX, 0.0, 1e4], np.float32)
    tokens, shares = distribution(logits, [], Sampling(temperature=1e300))
    assert (sorted(tokens.tolist()), shares.tolist()) == ([0, 1, 2, 3], [0.25] * 4)


@pytest.mark.parametrize("penalty", [1e-37, 1e37, MAX])
def test_a_penalty_at_the_ends_of_float32_gives_a_token_or_one_error(penalty: float) -> None:
    """The multiplication gave numpy's warning of an overflow."""
    sampler = Sampler(Sampling(repetition_penalty=penalty))
    for values in LOGITS.values():
        grown = max(values[token] / penalty for token in SEEN)
        error = pytest.raises(SessionError, match="overflows")
        with error if grown > MAX else nullcontext():
            assert 0 <= sampler.pick(np.array(values, np.float32), SEEN) < len(values)


@pytest.mark.parametrize("penalty", [1e-46, 1e-60, 5e-324, 1e39, 1e300])
def test_a_penalty_beyond_float32_is_refused(penalty: float) -> None:
    """It became 0 or Inf, and 0 / 0 was the logit of a token."""
    with pytest.raises(SessionError, match=r"repetition_penalty is .*, expected"):
        Sampling(repetition_penalty=penalty)


@pytest.mark.parametrize("token", [0, 63])
@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0])
def test_tokens_at_the_vocabulary_s_edges_are_chosen_fed_and_stopped_at(
    token: int, temperature: float
) -> None:
    def script(tokens: object) -> Logits:
        return np.where(np.arange(64) == token, 1e4, -1e4).astype(np.float32)

    sampling = Sampling(temperature, top_p=0.9, repetition_penalty=1.1, seed=1)
    session = FakeSession(script)
    assert [*generate(session, [5], max_new_tokens=3, sampling=sampling)] == [token] * 3
    assert session.tokens == [5, token, token]
    stopped = generate(
        FakeSession(script), [5], max_new_tokens=3, sampling=sampling, stop_tokens=[token]
    )
    assert [*stopped] == []


# Of these logits; see `tests/data/phone_vectors.py` for the seeds of the phones.
SPREAD = np.array([(token * 37 % 101) / 9 - 4 for token in range(101)], np.float32)
SEEDED = {
    0: [68, 90, 30, 30, 46, 24, 68, 57, 8, 84, 46, 30],
    7: [68, 95, 87, 90, 19, 35, 30, 46, 16, 79, 19, 90],
    2**32: [65, 38, 16, 73, 30, 90, 16, 30, 57, 68, 30, 60],
    2**63 - 1: [60, 79, 46, 19, 79, 46, 38, 87, 98, 60, 90, 60],
    2**200 + 5: [79, 8, 90, 90, 79, 87, 90, 60, 79, 60, 79, 60],
}


@pytest.mark.parametrize("seed", SEEDED)
def test_a_seed_gives_these_tokens(seed: int) -> None:
    sampler = Sampler(Sampling(temperature=1.0, top_k=90, top_p=0.98, min_p=1e-4, seed=seed))
    assert [sampler.pick(SPREAD, []) for _ in range(12)] == SEEDED[seed]


@pytest.mark.parametrize("seed", SEEDED)
def test_the_numbers_of_a_seed_are_those_of_pcg64_by_its_definition(seed: int) -> None:
    expected = np.random.Generator(np.random.PCG64(seed))
    noise = pcg64(seed)
    assert [next(noise) for _ in range(50)] == [expected.random() for _ in range(50)]


def test_a_session_s_tokens_follow_from_the_seed_alone() -> None:
    """Not from numpy's global state, nor from what was sampled before."""

    def tokens() -> list[int]:
        session = FakeSession(lambda tokens: np.roll(SPREAD, len(tokens)))
        sampling = Sampling(temperature=1.3, seed=11)
        return [*generate(session, [2], max_new_tokens=30, sampling=sampling)]

    first = tokens()
    np.random.seed(5)
    Sampler(Sampling(temperature=1.0, seed=11)).pick(SPREAD, [])
    assert tokens() == first


def test_infinite_temperatures_and_logits_stay_refused_without_a_warning() -> None:
    sampler = Sampler(Sampling(temperature=1.0))
    with pytest.raises(SessionError, match="overflows"):
        sampler.pick(np.full(4, -np.inf, np.float32), [])
    with pytest.raises(SessionError, match="temperature is inf"):
        Sampling(temperature=math.inf)


_WORD, _HALF, _WHOLE = (1 << 32) - 1, (1 << 64) - 1, (1 << 128) - 1


def pcg64(seed: int) -> Iterator[float]:
    """PCG XSL RR 128/64 after numpy's SeedSequence (https://www.pcg-random.org, NEP 19)."""
    words = [seed >> shift & _WORD for shift in range(0, max(1, seed.bit_length()), 32)]
    step = 0x2360ED051FC65DA44385DF649FCCF645
    a, b, c, d = _seed_words(words)
    increment = (c << 64 | d) << 1 & _WHOLE | 1
    state = ((increment + (a << 64 | b)) * step + increment) & _WHOLE
    while True:
        state = (state * step + increment) & _WHOLE
        high, low = state >> 64, state & _HALF
        turn, mixed = high >> 58, high ^ low
        bits = (mixed >> turn | mixed << (-turn & 63)) & _HALF
        yield (bits >> 11) * 2.0**-53


def _seed_words(words: list[int]) -> list[int]:
    """Four words of 64 bits from the words of 32 bits of a seed."""
    constant = 0x43B0D7E5

    def hashed(value: int) -> int:
        nonlocal constant
        value ^= constant
        constant = constant * 0x931E8875 & _WORD
        value = value * constant & _WORD
        return value ^ value >> 16

    def mixed(x: int, y: int) -> int:
        value = (x * 0xCA01F9DD - y * 0x4973F715) & _WORD
        return value ^ value >> 16

    pool = [hashed(word) for word in (words + [0] * 4)[:4]]
    for source, target in product(range(4), range(4)):
        if source != target:
            pool[target] = mixed(pool[target], hashed(pool[source]))
    for word, target in product(words[4:], range(4)):
        pool[target] = mixed(pool[target], hashed(word))
    constant, halves = 0x8B51F9DD, []
    for index in range(8):
        value = pool[index % 4] ^ constant
        constant = constant * 0x58F38DED & _WORD
        value = value * constant & _WORD
        halves.append(value ^ value >> 16)
    return [low | high << 32 for low, high in zip(halves[::2], halves[1::2], strict=True)]
