from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gemma_runtime.errors import BundleError
from gemma_runtime.manifest import Agreement
from gemma_runtime.proof.agreement import TIE_MARGIN, compare_logits, pool
from gemma_runtime.proof.goldens import Golden, load_goldens, log_sum_exp, save_goldens, top_logits

_seeds = st.integers(0, 2**32 - 1)


@given(_seeds, st.floats(0.0, 3.0), st.integers(1, 5))
def test_with_every_token_stored_kl_is_exact(seed: int, distance: float, length: int) -> None:
    expected, actual = _pair(seed, distance, length)

    agreement = compare_logits(actual, top_logits(expected, k=expected.shape[-1]))

    kl = _direct_kl(expected, actual)
    assert agreement.mean_kl == pytest.approx(kl.mean(), rel=1e-4, abs=1e-6)
    assert agreement.p99_kl == pytest.approx(np.quantile(kl, 0.99), rel=1e-4, abs=1e-6)


@given(_seeds, st.floats(0.0, 3.0), st.integers(1, 40))
def test_with_k_tokens_stored_kl_is_a_lower_bound(seed: int, distance: float, k: int) -> None:
    expected, actual = _pair(seed, distance, 4)

    agreement = compare_logits(actual, top_logits(expected, k))

    assert -1e-6 <= agreement.mean_kl <= _direct_kl(expected, actual).mean() + 1e-6


def test_the_bound_is_tight_if_k_tokens_have_nearly_all_probability() -> None:
    expected, actual = _pair(3, 0.5, 16, spread=6.0)

    agreement = compare_logits(actual, top_logits(expected, 16))

    assert agreement.mean_kl == pytest.approx(_direct_kl(expected, actual).mean(), rel=0.02)


@given(_seeds, st.floats(-50, 50))
def test_a_constant_added_to_all_logits_leaves_kl_at_zero(seed: int, constant: float) -> None:
    expected, _ = _pair(seed, 0.0, 3)

    agreement = compare_logits((expected + constant).astype(np.float32), top_logits(expected))

    assert agreement.mean_kl == pytest.approx(0, abs=1e-5)
    assert agreement.max_abs == pytest.approx(abs(constant), abs=1e-4)


def test_top_1_near_ties_and_differences_of_a_small_example() -> None:
    expected = np.array([[5, 1, 0, 0], [5, 4.95, 0, 0], [5, 1, 0, 0], [5, 1, 0, 0]], np.float32)
    actual = expected.copy()
    actual[1, :2] = 4.9, 5.0  # a near tie that went the other way
    actual[2, :2] = 1, 5  # not a tie

    agreement = compare_logits(actual, top_logits(expected, k=2))

    assert (agreement.positions, agreement.top1, agreement.near_ties) == (4, 0.5, 1)
    assert agreement.max_abs == 4
    assert agreement.mean_abs == pytest.approx((0.1 + 0.05 + 4 + 4) / 8, rel=1e-5)


@pytest.mark.parametrize(("lead", "ties"), [(TIE_MARGIN * 0.9, 1), (TIE_MARGIN * 1.1, 0)])
def test_a_near_tie_depends_on_the_reference_s_lead(lead: float, ties: int) -> None:
    expected = np.array([[3 + lead, 3, 0]], np.float32)

    assert compare_logits(expected[:, [1, 0, 2]], top_logits(expected)).near_ties == ties


def test_a_choice_outside_the_stored_tokens_is_not_a_near_tie() -> None:
    expected = np.array([[3.0, 2.99, 2.98, 2.97]], np.float32)
    actual = np.array([[0.0, 0.0, 0.0, 9.0]], np.float32)

    agreement = compare_logits(actual, top_logits(expected, k=2))

    assert (agreement.top1, agreement.near_ties) == (0, 0)


@given(_seeds, st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_pooled_means_are_means_over_all_positions(seed: int, lengths: list[int]) -> None:
    pairs = [_pair(seed + index, 1.0, length) for index, length in enumerate(lengths)]
    each = [compare_logits(actual, top_logits(expected)) for expected, actual in pairs]
    together = compare_logits(
        np.concatenate([actual for _, actual in pairs]),
        top_logits(np.concatenate([expected for expected, _ in pairs])),
    )

    pooled = pool(each)

    assert (pooled.positions, pooled.near_ties) == (together.positions, together.near_ties)
    assert pooled.max_abs == together.max_abs
    assert pooled.top1 == pytest.approx(together.top1)
    assert pooled.mean_abs == pytest.approx(together.mean_abs)
    assert pooled.mean_kl == pytest.approx(together.mean_kl)
    assert pooled.p99_kl == max(agreement.p99_kl for agreement in each)


def test_one_agreement_pools_to_itself() -> None:
    agreement = Agreement(7, 0.5, 2, 3.0, 0.25, 0.125, 0.75)

    assert pool([agreement]) == agreement


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_goldens_keep_every_bit_of_a_logit(
    tmp_path_factory: pytest.TempPathFactory, row: list[float]
) -> None:
    logits = np.array([row], np.float32)
    top = top_logits(logits, k=len(row))
    path = tmp_path_factory.mktemp("goldens") / "goldens.json"

    save_goldens(path, [Golden("one", [2], top, top)])
    (golden,) = load_goldens(path)

    kept = np.array(golden.reference.logits, np.float32)
    assert np.array_equal(kept, np.take_along_axis(logits, np.array(top.ids), -1))
    assert golden.quantized == golden.reference


@given(_seeds, st.integers(1, 60))
def test_top_logits_are_the_largest_in_order(seed: int, k: int) -> None:
    logits, _ = _pair(seed, 0.0, 3)

    top = top_logits(logits, k)

    expected = -np.sort(-logits, axis=-1)[:, :k]
    assert np.array_equal(np.array(top.logits, np.float32), expected)
    assert top.log_sum_exp == pytest.approx(log_sum_exp(logits).tolist(), rel=1e-8)


def test_log_sum_exp_of_huge_logits_does_not_overflow() -> None:
    logits = np.full((1, 4), 1e30, np.float32)

    assert log_sum_exp(logits)[0] == pytest.approx(1e30)


@pytest.mark.parametrize("text", [b"", b"{}", b'[{"name": "x"}]', b"\xff"])
def test_a_file_without_goldens_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "goldens.json"
    path.write_bytes(text)

    with pytest.raises(BundleError, match="is not a goldens file"):
        load_goldens(path)


def test_a_missing_goldens_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a goldens file"):
        load_goldens(tmp_path / "goldens.json")


def _pair(
    seed: int, distance: float, length: int, spread: float = 2.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two sets of (length, 40) logits, `distance` apart."""
    draw = np.random.default_rng(seed)
    expected = draw.normal(0, spread, (length, 40))
    actual = expected + draw.normal(0, 1, expected.shape) * distance
    return expected.astype(np.float32), actual.astype(np.float32)


def _direct_kl(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> NDArray[np.float64]:
    log_p, log_q = _log_softmax(expected), _log_softmax(actual)
    kl: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return kl


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
