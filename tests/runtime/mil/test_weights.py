"""Compressed weights: every element has the value of its code, rounded to the declared type."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_runtime.formats.protobuf import Damaged
from gemma_runtime.mil.blob import Nibbles
from gemma_runtime.mil.ops import OPERATIONS
from gemma_runtime.mil.package import MilValue
from gemma_runtime.mil.weights import (
    PlainWeight,
    Weight,
    dense,
    multiply,
    open_block_weight,
    open_table_weight,
    take_rows,
)

F16 = np.dtype(np.float16)


def nibbles(codes: np.ndarray, signed: bool) -> Nibbles:
    flat = (codes.reshape(-1) & 15).astype(np.uint8)
    flat = np.pad(flat, (0, len(flat) % 2))
    packed = (flat[::2] | flat[1::2] << 4).astype(np.uint8)
    return Nibbles(packed, codes.shape, signed)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.sampled_from([1, 3, 8, 70]),
    width=st.sampled_from([1, 3, 6, 32, 96]),
    bits=st.sampled_from([4, 8]),
    shifted=st.booleans(),
    magnitude=st.sampled_from([1e-7, 1e-5, 1e-2, 1.0, 6e4]),
)
def test_an_element_is_scale_times_code_rounded(
    seed: int, rows: int, width: int, bits: int, shifted: bool, magnitude: float
) -> None:
    """Covers scales below float16's normal range and products that overflow it."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, width)).astype(np.int8)
    blocks = (int(rng.choice([1, rows])), int(rng.choice([1, width, max(1, width // 32)])))
    scale = (rng.uniform(0.1, 1, blocks) * magnitude).astype(np.float16)
    offset = rng.integers(-8, 8, blocks).astype(np.int8) if shifted else None
    arguments: dict[str, MilValue] = {"data": codes, "scale": scale}
    if offset is not None:
        arguments["offset"] = offset
    with np.errstate(over="ignore"):
        expected = np.asarray(OPERATIONS["constexpr_blockwise_shift_scale"](arguments)).astype(F16)
    stored = nibbles(codes, True) if bits == 4 else codes
    check(open_block_weight(stored, scale, offset, F16), expected, rng)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.sampled_from([3, 6, 32]),
    tables=st.sampled_from([(1, 1), (4, 1), (8, 3), (1, 3)]),
)
def test_an_element_is_its_code_s_table_entry(
    seed: int, width: int, tables: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    width = width * tables[1]
    codes = rng.integers(0, 16, (8, width)).astype(np.uint8)
    lut = rng.standard_normal((*tables, 16, 1)).astype(np.float16)
    rows = np.arange(8)[:, None] // (8 // tables[0])
    expected = lut[rows, np.arange(width) // (width // tables[1]), codes, 0]
    actual = OPERATIONS["constexpr_lut_to_dense"]({"indices": codes, "lut": lut})
    assert np.array_equal(actual, expected)
    check(open_table_weight(nibbles(codes, False), lut, F16), expected, rng)
    check(open_table_weight(codes, lut, F16), expected, rng)


def check(weight: Weight, expected: np.ndarray, rng: np.random.Generator) -> None:
    assert np.array_equal(dense(weight), expected)
    rows = rng.integers(0, len(expected), 4)
    assert np.array_equal(take_rows(weight, rows), expected[rows])
    if not np.isfinite(expected).all():
        return
    with ThreadPoolExecutor(2) as threads:
        for tokens in (1, 3):
            x = rng.standard_normal((tokens, expected.shape[1])).astype(np.float32)
            right = x.astype(np.float64) @ expected.T.astype(np.float64)
            bound = 1e-5 * (np.abs(x) @ np.abs(expected.T.astype(np.float32))) + 1e-30
            assert (np.abs(multiply(x, weight, threads, 2) - right) <= bound).all()


def test_a_large_matrix_is_multiplied_in_blocks() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (1501, 640)).astype(np.int8)
    scale = rng.uniform(0.01, 0.1, (1501, 20)).astype(np.float16)
    expected = (codes * scale.astype(np.float32).repeat(32, 1)).astype(F16)
    check(open_block_weight(nibbles(codes, True), scale, None, F16), expected, rng)


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
def test_a_weight_that_is_not_finite_stays_so(odd: float) -> None:
    """It was read as 65536 or more, so a program with a weight beyond float16 looked right here."""
    values = np.full((4, 8), 65504, np.float16)
    values[2, 3] = odd
    with ThreadPoolExecutor(1) as threads:
        for tokens in (1, 3):
            found = multiply(np.ones((tokens, 8), np.float32), PlainWeight(values), threads, 1)
            assert np.isfinite(found[:, [0, 1, 3]]).all()
            assert np.array_equal(found[:, 2], np.full(tokens, odd, np.float32), equal_nan=True)


def test_blocks_that_don_t_divide_are_refused() -> None:
    with pytest.raises(Damaged, match="don't divide"):
        open_block_weight(np.zeros((4, 6), np.int8), np.ones((4, 4), np.float16), None, F16)
    with pytest.raises(Damaged, match="only scalar entries"):
        open_table_weight(np.zeros((4, 6), np.uint8), np.ones((1, 1, 16, 2), np.float16), F16)
