import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gemma_runtime.errors import SessionError
from gemma_runtime.session import Logits
from gemma_runtime.text.sampler import Sampler, Sampling, distribution

LOGITS = st.lists(st.floats(-20, 20, width=16), min_size=1, max_size=30).map(
    lambda values: np.array(values, np.float32)
)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0.1, 4),
    top_k=st.integers(0, 12),
    top_p=st.just(1.0) | st.floats(0.05, 1),
    min_p=st.just(0.0) | st.floats(0, 1),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
)


def by_definition(logits: Logits, previous: list[int], sampling: Sampling) -> dict[int, float]:
    """Probabilities by token: the filters applied one by one to a sorted list."""
    scores = logits.copy()
    for token in {token for token in previous if token < len(logits)}:
        penalty = np.float32(sampling.repetition_penalty)
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    scaled = [float(score) / sampling.temperature for score in scores]
    kept = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    if 0 < sampling.top_k < len(kept):
        kept = [token for token in kept if scaled[token] >= scaled[kept[sampling.top_k - 1]]]
    weights = {token: math.exp(scaled[token] - scaled[kept[0]]) for token in kept}
    total, above = sum(weights.values()), 0.0
    for token in kept:
        weight = weights[token]
        if above / total >= sampling.top_p and sampling.top_p < 1 and above > 0:
            del weights[token]
        above += weight
    weights = {token: weight for token, weight in weights.items() if weight >= sampling.min_p}
    return {token: weight / sum(weights.values()) for token, weight in weights.items()}


@given(logits=LOGITS, previous=st.lists(st.integers(0, 40)), sampling=SAMPLINGS)
def test_probabilities_follow_the_definition(
    logits: Logits, previous: list[int], sampling: Sampling
) -> None:
    expected = by_definition(logits, previous, sampling)
    tokens, weights = distribution(logits, previous, sampling)
    assert weights.sum() == pytest.approx(1)
    assert (np.diff(weights) <= 0).all()
    # Rounding may move a token across a threshold; only such tokens may differ.
    if set(tokens.tolist()) == set(expected):
        assert weights == pytest.approx([expected[token] for token in tokens.tolist()])
    else:
        assert _on_a_threshold(logits, previous, sampling, set(tokens.tolist()) ^ set(expected))


def _on_a_threshold(
    logits: Logits, previous: list[int], sampling: Sampling, tokens: set[int]
) -> bool:
    """Whether changing top-p and min-p by 1e-9 keeps or drops every one of `tokens`."""
    kept = []
    for change in (-1e-9, 1e-9):
        near = Sampling(
            sampling.temperature,
            sampling.top_k,
            min(1.0, sampling.top_p + change),
            min(1.0, max(0.0, sampling.min_p + change)),
            sampling.repetition_penalty,
        )
        kept.append(set(by_definition(logits, previous, near)))
    return tokens <= kept[0] ^ kept[1]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, repetition_penalty=1.2),
        Sampling(temperature=1.3, top_k=40),
        Sampling(temperature=1.0, top_p=0.9),
        Sampling(temperature=2.5, top_p=0.99),
        Sampling(temperature=0.9, min_p=0.05),
        Sampling(temperature=1.1, top_k=64, top_p=0.95, min_p=0.02, repetition_penalty=1.1),
    ],
)
def test_probabilities_are_those_of_transformers(sampling: Sampling) -> None:
    logits = random_logits(5000)
    previous = [*np.argsort(-logits)[:7].tolist(), *np.flatnonzero(logits < 0)[:20].tolist(), 3, 3]
    expected = _transformers(logits, previous, sampling)
    tokens, weights = distribution(logits, previous, sampling)
    assert set(tokens.tolist()) == set(np.flatnonzero(expected).tolist())
    np.testing.assert_allclose(weights, expected[tokens], rtol=1e-4)


def _transformers(logits: Logits, previous: list[int], sampling: Sampling) -> NDArray[np.float32]:
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    chain = hf.LogitsProcessorList()
    chain.append(hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    chain.append(hf.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(hf.TopKLogitsWarper(sampling.top_k))
    chain.append(hf.TopPLogitsWarper(sampling.top_p))
    chain.append(hf.MinPLogitsWarper(sampling.min_p))
    scores = chain(torch.LongTensor([previous]), torch.FloatTensor(logits)[None])
    weights: NDArray[np.float32] = scores.softmax(-1)[0].numpy()
    return weights


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=1))
    counts = np.bincount([sampler.pick(logits, []) for _ in range(20000)], minlength=4)
    np.testing.assert_allclose(counts / 20000, [0.5, 0.3, 0.15, 0.05], atol=0.015)


def test_the_same_seed_repeats_its_draws_and_another_does_not() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, top_k=500, top_p=0.99, seed=seed))
        return [sampler.pick(logits, []) for _ in range(50)]

    logits = random_logits(5000)
    assert draws(7) == draws(7)
    assert draws(7) != draws(8)


def test_a_flat_distribution_keeps_its_top_p_share() -> None:
    logits = np.linspace(0, 1e-3, 20000, dtype=np.float32)
    tokens, _ = distribution(logits, [], Sampling(temperature=1.0, top_p=0.5))
    assert len(tokens) == pytest.approx(10000, abs=20)
    assert tokens.min() > 9950


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-3])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    """The division overflowed, and the last token was drawn."""
    logits = np.array([1.0, 5.0, -np.inf, 4.9], np.float32)
    sampling = Sampling(temperature=temperature, top_p=0.9, min_p=0.1, seed=0)
    assert Sampler(sampling).pick(logits, []) == 1
    assert distribution(logits, [], sampling)[0].tolist() == [1]


@pytest.mark.parametrize("top_p", [1e-300, 1e-17, 1e-9])
def test_the_smallest_top_p_keeps_a_token(top_p: float) -> None:
    """With equal logits no token was kept, and the draw failed."""
    tokens, weights = distribution(
        np.zeros(7, np.float32), [], Sampling(temperature=1, top_p=top_p)
    )
    assert (len(tokens), weights.tolist()) == (1, [1.0])


def test_the_largest_min_p_keeps_the_likeliest_tokens() -> None:
    logits = np.array([1, 3, 3, 2], np.float32)
    tokens, shares = distribution(logits, [], Sampling(temperature=1, min_p=1))
    assert (tokens.tolist(), shares.tolist()) == ([1, 2], [0.5, 0.5])


def test_tokens_that_hold_exactly_top_p_are_enough() -> None:
    tokens, _ = distribution(np.zeros(4, np.float32), [], Sampling(temperature=1, top_p=0.5))
    assert len(tokens) == 2


@given(logits=LOGITS)
def test_greedy_takes_the_first_of_the_most_likely_tokens(logits: Logits) -> None:
    sampler = Sampler(Sampling(top_k=2, top_p=0.1))
    assert sampler.pick(logits, [0, 1]) == int(np.argmax(logits))


def test_greedy_applies_the_penalty_without_changing_the_logits() -> None:
    logits = np.array([2.0, 1.5, -1.0], np.float32)
    assert Sampler(Sampling(repetition_penalty=2.0)).pick(logits, [0, 0, 99]) == 1
    assert logits.tolist() == [2.0, 1.5, -1.0]


def test_tokens_with_a_logit_of_minus_infinity_are_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], np.float32)
    sampler = Sampler(Sampling(temperature=1.0, top_k=3, top_p=0.99, seed=0))
    assert {sampler.pick(logits, []) for _ in range(200)} == {1, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_overflowed_logits_are_refused(temperature: float, wrong: float) -> None:
    logits = np.array([0.0, wrong, 1.0], np.float32)
    with pytest.raises(SessionError, match="overflows"):
        Sampler(Sampling(temperature=temperature, top_p=0.9)).pick(logits, [])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(SessionError, match=f"{field} is {value}, expected"):
        Sampling(**{field: value})  # type: ignore[arg-type]


def random_logits(size: int) -> Logits:
    return np.random.default_rng(0).normal(0, 3, size).astype(np.float32)
