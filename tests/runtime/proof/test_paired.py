import math

import numpy as np
import pytest

from gemma_runtime.proof.paired import (
    choice_kl,
    count_flips,
    log_choices,
    mcnemar,
    paired_difference,
    smallest_difference,
)


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [
        # Fay, "Exact McNemar's Test and Matching Confidence Intervals" (R's exact2x2): p = 0.06543
        (9, 2, 134 / 2048),
        (6, 0, 0.03125),  # 2 / 2^6
        (5, 0, 0.0625),
        (1, 2, 1.0),  # 2 (1 + 3) / 8
        (7, 7, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_gives_published_and_hand_made_values(lost: int, won: int, p: float) -> None:
    assert mcnemar(lost, won) == pytest.approx(p, abs=5e-7)
    assert mcnemar(won, lost) == mcnemar(lost, won)


@pytest.mark.parametrize(("lost", "won"), [(3, 14), (40, 61), (5000, 5200)])
def test_mcnemar_is_the_binomial_tail(lost: int, won: int) -> None:
    n = lost + won
    tail = sum(
        math.exp(math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2))
        for i in range(min(lost, won) + 1)
    )

    assert mcnemar(lost, won) == pytest.approx(2 * tail, rel=1e-8)


def test_the_interval_of_independent_questions_is_the_normal_one() -> None:
    random = np.random.default_rng(3)
    a, b = random.normal(0, 1, 2000), random.normal(0.1, 1, 2000)

    mean, low, high = paired_difference(a, b)

    error = (b - a).std() / math.sqrt(2000)
    assert mean == pytest.approx((b - a).mean())
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


def test_the_interval_holds_the_truth_in_95_of_100_clustered_samples() -> None:
    """An interval that ignores clusters misses it in far more."""
    clustered = ignored = 0
    subjects = np.repeat(np.arange(40), 10).tolist()
    for seed in range(200):
        random = np.random.default_rng(seed)
        effect = np.repeat(random.normal(0, 1, 40), 10)
        b = 0.3 + effect + random.normal(0, 1, 400)
        for names in (subjects, None):
            _, low, high = paired_difference(np.zeros(400), b, names, seed)
            held = low <= 0.3 <= high
            clustered += held and names is not None
            ignored += held and names is None

    assert 0.90 <= clustered / 200 <= 0.98
    assert ignored / 200 < 0.65


def test_the_same_scores_have_no_difference_and_no_interval() -> None:
    scores = [0, 1, 1, 0, 1]

    assert paired_difference(scores, scores) == (0, 0, 0)
    assert count_flips(scores, scores) == (0, 0)


def test_pairing_removes_what_the_questions_have_in_common() -> None:
    difficulty = np.random.default_rng(0).normal(0, 10, 50)

    mean, low, high = paired_difference(difficulty, difficulty + 0.5)

    assert (mean, low, high) == pytest.approx((0.5, 0.5, 0.5))


def test_a_single_cluster_counts_as_independent_questions() -> None:
    """One cluster would be drawn every time, with an interval of no width."""
    a, b = np.zeros(20), np.tile([0.0, 1.0], 10)

    assert paired_difference(a, b, ["all"] * 20) == paired_difference(a, b)


def test_the_seed_decides_the_interval() -> None:
    a, b = np.zeros(30), np.random.default_rng(1).normal(size=30)

    assert paired_difference(a, b, seed=1) == paired_difference(a, b, seed=1)
    assert paired_difference(a, b, seed=1) != paired_difference(a, b, seed=2)


def test_the_smallest_difference_is_found_in_80_of_100_runs() -> None:
    found = 0
    for seed in range(400):
        random = np.random.default_rng(seed)
        b = random.normal(0.28, 1, 100)  # smallest_difference says 0.28 for a deviation of 1
        error = b.std(ddof=1) / 10
        found += abs(b.mean()) > 1.96 * error

    expected = smallest_difference(np.zeros(10_000), np.random.default_rng(0).normal(0, 1, 10_000))
    assert expected == pytest.approx(0.028, rel=0.03)
    assert found / 400 == pytest.approx(0.8, abs=0.05)


def test_scores_of_0_and_1_need_six_flips() -> None:
    scores = [1.0] * 40

    assert smallest_difference(scores, scores) == pytest.approx(6 / 40)
    assert mcnemar(6, 0) < 0.05 < mcnemar(5, 0)


def test_clusters_raise_the_smallest_difference() -> None:
    b = np.repeat(np.random.default_rng(5).normal(0, 1, 30), 10)
    subjects = np.repeat(np.arange(30), 10).tolist()

    plain, clustered = smallest_difference(0 * b, b), smallest_difference(0 * b, b, subjects)
    assert clustered == pytest.approx(plain * math.sqrt(10))


def test_flips_count_both_directions() -> None:
    assert count_flips([1, 1, 0, 0, 1], [0, 1, 1, 0, 0]) == (2, 1)


def test_choice_kl_is_that_of_normalized_choices() -> None:
    a, b = [-1.0, -2.0, -3.0], [-2.5, -1.5, -4.0]

    p, q = (np.exp(x) / np.exp(x).sum() for x in (a, b))
    assert choice_kl(a, b) == pytest.approx(float((p * np.log(p / q)).sum()))
    assert choice_kl(a, [x - 700 for x in a]) == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(np.exp(log_choices(a)), p)


@pytest.mark.parametrize(
    ("a", "b", "clusters"), [([1.0], [1.0, 0.0], None), ([], [], None), ([1.0], [1.0], ["x", "y"])]
)
def test_unequal_or_no_questions_are_refused(
    a: list[float], b: list[float], clusters: list[str] | None
) -> None:
    with pytest.raises(ValueError, match=r"expected|clusters"):
        paired_difference(a, b, clusters)
