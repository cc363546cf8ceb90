"""Fronts and compromises, for any vectors."""

import math

from hypothesis import given
from hypothesis import strategies as st

from gemma_export.search.pareto import Vector, compromise, dominates, front

# Few values, so that equal components and equal vectors are common.
NUMBERS = st.integers(-2, 2).map(float) | st.floats(-1e6, 1e6)
VECTORS = st.integers(1, 4).flatmap(
    lambda size: st.lists(st.tuples(*[NUMBERS] * size), min_size=1, max_size=12)
)


@given(VECTORS)
def test_a_vector_is_on_the_front_unless_one_of_the_front_dominates_it(
    vectors: list[Vector],
) -> None:
    best = front(vectors)
    assert best
    for index, vector in enumerate(vectors):
        beaten = any(dominates(vectors[other], vector) for other in best)
        assert beaten is (index not in best)


@given(VECTORS, st.randoms(use_true_random=False))
def test_the_front_does_not_depend_on_the_order(vectors: list[Vector], random: object) -> None:
    shuffled = list(vectors)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert sorted(shuffled[i] for i in front(shuffled)) == sorted(
        vectors[i] for i in front(vectors)
    )


@given(VECTORS)
def test_the_front_holds_the_best_of_each_component(vectors: list[Vector]) -> None:
    best = [vectors[index] for index in front(vectors)]
    for place in range(len(vectors[0])):
        assert min(vector[place] for vector in best) == min(vector[place] for vector in vectors)


@given(VECTORS)
def test_no_vector_dominates_itself_or_one_that_dominates_it(vectors: list[Vector]) -> None:
    for a in vectors:
        for b in vectors:
            assert not (dominates(a, b) and dominates(b, a))


@given(VECTORS)
def test_the_compromise_of_a_front_is_the_nearest_to_the_ideal_vector(
    vectors: list[Vector],
) -> None:
    best = [vectors[index] for index in front(vectors)]
    taken = best[compromise(best)]
    lows = [min(column) for column in zip(*best, strict=True)]
    highs = [max(column) for column in zip(*best, strict=True)]

    def squares(vector: Vector) -> float:
        ends = zip(vector, lows, highs, strict=True)
        return math.fsum(((x - low) / (high - low or 1)) ** 2 for x, low, high in ends)

    assert squares(taken) <= min(map(squares, best)) * (1 + 1e-9) + 1e-12


def test_a_compromise_is_not_an_extreme() -> None:
    assert compromise([(0.0, 1.0), (0.1, 0.1), (1.0, 0.0)]) == 1
