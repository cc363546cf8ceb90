"""Multiplies by compressed weights, dequantizing one block of rows at a time.

A device multiplies by weights that are rounded to their declared type, so each dequantized block is
rounded too. N rows, K columns, T tokens.
"""

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.formats.protobuf import Damaged
from gemma_runtime.mil.blob import Array, Nibbles, unpack_nibbles

Floats: TypeAlias = NDArray[np.float32]

_BLOCK = 1 << 17  # elements dequantized at a time: half of a core's cache
_WIDE_BLOCK = 1 << 21  # the same for several tokens, where BLAS uses all threads
_GEMV = 9000  # up to this many elements OpenBLAS multiplies in the calling thread
_SPLIT = np.float32(2**13 + 1)  # Veltkamp's factor: keeps 24 - 13 = 11 bits
_SIGN_EXPONENT_FRACTION = np.uint32(0x8FFFE000).view(np.int32)  # float16's bits within float32's
_MAX_HALF = 65504
_local = threading.local()


@dataclass(frozen=True, slots=True, eq=False)
class BlockWeight:
    """A matrix of constexpr_blockwise_shift_scale: scale · (code - offset).

    Each block has one scale and one offset. Blocks divide rows and columns evenly.
    """

    codes: Nibbles | Array  # (N, K)
    scale: Floats  # (N or a divisor, a divisor of K)
    offset: Floats | None  # the scale's shape
    dtype: np.dtype[np.generic]
    is_split_exact: bool  # whether all products are an integer times a float16, within its range

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def widen_rows(self, start: int, stop: int, out: Floats) -> None:
        """Write rows [start, stop) to `out` as float32, rounded to the declared type."""
        _widen_codes(self.codes, start, stop, out)
        blocks = out.reshape(stop - start, self.scale.shape[1], -1)
        rows = np.arange(start, stop) // (self.shape[0] // len(self.scale))
        if self.offset is not None:
            np.subtract(blocks, self.offset[rows][:, :, None], out=blocks)
        np.multiply(blocks, self.scale[rows][:, :, None], out=blocks)
        if self.dtype == np.float16:
            _round_to_half(out, self.is_split_exact)


@dataclass(frozen=True, slots=True, eq=False)
class TableWeight:
    """A matrix of constexpr_lut_to_dense: one table per block gives a scalar for each code."""

    codes: Nibbles | Array  # (N, K)
    tables: Array  # (N or a divisor, a divisor of K, entries)
    dtype: np.dtype[np.generic]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def widen_rows(self, start: int, stop: int, out: Floats) -> None:
        """Write rows [start, stop) to `out` as float32."""
        row_blocks, column_blocks, entries = self.tables.shape
        tables = self.tables.astype(np.float32)
        codes = _code_rows(self.codes, start, stop).astype(np.intp)
        if row_blocks == column_blocks == 1:
            np.take(tables[0, 0], codes, out=out, mode="clip")
            return
        rows = np.arange(start, stop) // (self.shape[0] // row_blocks)
        columns = np.arange(self.shape[1]) // (self.shape[1] // column_blocks)
        positions = (rows[:, None] * column_blocks + columns) * entries + codes
        np.take(tables.reshape(-1), positions, out=out, mode="clip")


@dataclass(frozen=True, slots=True, eq=False)
class PlainWeight:
    """A matrix that is not compressed."""

    values: Array  # (N, K)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return self.values.dtype

    def widen_rows(self, start: int, stop: int, out: Floats) -> None:
        out[...] = widen(self.values[start:stop])


Weight: TypeAlias = BlockWeight | TableWeight | PlainWeight


def open_block_weight(
    codes: Nibbles | Array,
    scale: Array,
    offset: Array | Nibbles | None,
    dtype: np.dtype[np.generic],
) -> BlockWeight:
    """Raises Damaged if the blocks don't divide the matrix."""
    shift = offset.unpack() if isinstance(offset, Nibbles) else offset
    _check_blocks(codes.shape, scale.shape)
    if shift is not None and shift.shape != scale.shape:
        raise Damaged(f"offsets have the shape {shift.shape}, scales {scale.shape}")
    scales = scale.astype(np.float32)
    largest = float(np.abs(scales).max(initial=0))
    largest_code = 256 if shift is None or shift.dtype.kind in "iu" else math.inf
    exact = scale.dtype == np.float16 and largest * largest_code < _MAX_HALF
    return BlockWeight(
        codes, scales, None if shift is None else shift.astype(np.float32), dtype, bool(exact)
    )


def open_table_weight(
    codes: Nibbles | Array, tables: Array, dtype: np.dtype[np.generic]
) -> TableWeight:
    """`tables` is (…, entries, 1). Raises Damaged for vector entries and uneven blocks."""
    if tables.ndim != len(codes.shape) + 2 or tables.shape[-1] != 1:
        raise Damaged(f"a lookup table has the shape {tables.shape}; only scalar entries work")
    _check_blocks(codes.shape, tables.shape[:-2])
    return TableWeight(codes, tables[..., 0], dtype)


def dense(weight: Weight) -> Array:
    """The dequantized matrix in its declared type, (N, K)."""
    if isinstance(weight, PlainWeight):
        return weight.values
    return take_rows(weight, np.arange(weight.shape[0]))


def take_rows(weight: Weight, indices: Array) -> Array:
    """The rows at `indices`, (…), in the declared type: (…, K)."""
    width = weight.shape[1]
    rows = np.empty((indices.size, width), weight.dtype)
    row = np.empty((1, width), np.float32)
    for position, index in enumerate(indices.reshape(-1).tolist()):
        weight.widen_rows(index, index + 1, row)
        rows[position] = row
    return rows.reshape(*indices.shape, width)


def multiply(x: Floats, weight: Weight, threads: ThreadPoolExecutor, count: int) -> Floats:
    """x @ weight.T, (…, K) → (…, N), on `count` threads."""
    rows, width = weight.shape
    flat = np.ascontiguousarray(x).reshape(-1, width)  # (T, K)
    y = np.empty((len(flat), rows), np.float32)
    if len(flat) == 1:
        edges = [rows * part // count for part in range(count + 1)]
        spans = list(pairwise(edges))
        if rows * width <= _BLOCK:
            _multiply_vector(flat[0], weight, 0, rows, y[0])
        else:
            list(threads.map(lambda s: _multiply_vector(flat[0], weight, s[0], s[1], y[0]), spans))
        return y.reshape(*x.shape[:-1], rows)
    step = max(1, _WIDE_BLOCK // width)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        y[:, start:stop] = flat @ _widen_wide(weight, start, stop, threads, count).T
    return y.reshape(*x.shape[:-1], rows)


def widen(weight: Array) -> Floats:
    """Convert float16 to float32 by shifting bits: four times as fast as numpy.

    That makes 65536 or more of Inf and NaN, so numpy converts these, and other types.
    """
    if weight.dtype != np.float16:
        return weight.astype(np.float32)
    bits = weight.view(np.int16).astype(np.int32)  # sign-extended
    bits <<= 13
    bits &= _SIGN_EXPONENT_FRACTION
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)  # float32's exponent bias is 112 larger
    if max(values.max(initial=0), -values.min(initial=0)) > _MAX_HALF:
        return weight.astype(np.float32)
    return values


def _multiply_vector(x: Floats, weight: Weight, start: int, stop: int, y: Floats) -> None:
    """y[start:stop] = weight[start:stop] @ x, as products too small for OpenBLAS to use threads."""
    width = len(x)
    few = max(1, _GEMV // width)
    step = max(1, _BLOCK // width // few) * few
    for first in range(start, stop, step):
        last = min(first + step, stop)
        block = _scratch("block", step * width)[: (last - first) * width]
        weight.widen_rows(first, last, block.reshape(last - first, width))
        stacked = (last - first) // few * few
        stack = block[: stacked * width].reshape(-1, few, width)
        y[first : first + stacked] = (stack @ x).reshape(-1)
        if stacked < last - first:
            y[first + stacked : last] = block[stacked * width :].reshape(-1, width) @ x


def _widen_wide(
    weight: Weight, start: int, stop: int, threads: ThreadPoolExecutor, count: int
) -> Floats:
    width = weight.shape[1]
    out = _scratch("wide", (stop - start) * width).reshape(-1, width)
    step = max(1, _BLOCK // width)
    parts = [(first, min(first + step, stop)) for first in range(start, stop, step)]

    def widen_parts(own: Sequence[tuple[int, int]]) -> None:
        for first, last in own:
            weight.widen_rows(first, last, out[first - start : last - start])

    list(threads.map(widen_parts, [parts[part::count] for part in range(count)]))
    return out


def _round_to_half(values: Floats, is_split_exact: bool) -> None:
    """Round to float16 in place. Veltkamp's split keeps eleven bits and rounds ties to even.

    Below float16's normal range there is nothing to round: an integer times a float16 is a multiple
    of its smallest step. Checked for every product with integers up to 255.
    """
    if not is_split_exact:
        with np.errstate(over="ignore"):  # it overflows on a device too
            values[...] = values.astype(np.float16)
        return
    split = _scratch("split", values.size).reshape(values.shape)
    np.multiply(values, _SPLIT, out=split)
    np.subtract(split, values, out=values)
    np.subtract(split, values, out=values)


def _widen_codes(codes: Nibbles | Array, start: int, stop: int, out: Floats) -> None:
    width = codes.shape[1]
    if isinstance(codes, Nibbles) and width % 4 == 0:
        packed = codes.packed[start * width // 2 : stop * width // 2].view("<u2")
        four = out.reshape(-1).view(np.complex128)  # 16 bytes: four float32
        np.take(_quads(codes.signed), packed, out=four, mode="clip")
    else:
        out[...] = _code_rows(codes, start, stop)


def _code_rows(codes: Nibbles | Array, start: int, stop: int) -> Array:
    if not isinstance(codes, Nibbles):
        return codes[start:stop]
    width = codes.shape[1]
    first, last = start * width, stop * width
    part = Nibbles(codes.packed[first // 2 : (last + 1) // 2], (last - first + first % 2,), False)
    return _signed(part.unpack()[first % 2 :], codes.signed).reshape(-1, width)


def _signed(values: Array, signed: bool) -> Array:
    """Interpret 4-bit values as two's complement if `signed`."""
    return (values.astype(np.uint8) ^ 8).astype(np.int8) - np.int8(8) if signed else values


@cache
def _quads(signed: bool) -> NDArray[np.complex128]:
    """Lookup table from two bytes to their four codes as float32, each entry 16 bytes."""
    two_bytes = np.arange(1 << 16, dtype="<u2").view(np.uint8)
    return unpack_nibbles(two_bytes, signed).astype(np.float32).view(np.complex128)


def _scratch(name: str, size: int) -> Floats:
    """A buffer of this thread, reused because allocating costs more than the work in it."""
    buffer: Floats | None = getattr(_local, name, None)
    if buffer is None or buffer.size < size:
        buffer = np.empty(size, np.float32)
        setattr(_local, name, buffer)
    return buffer[:size]


def _check_blocks(shape: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    if len(shape) != len(blocks) or any(
        b == 0 or size % b for size, b in zip(shape, blocks, strict=True)
    ):
        raise Damaged(f"blocks {blocks} don't divide a weight of {shape}")
