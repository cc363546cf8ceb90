"""Compressed weights, multiplied from where they lie: a block of rows is widened at a time.

What a device multiplies is the weight rounded to its declared type, so that is what a block holds.
N rows, K columns, T tokens.
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

from gemma_runtime.mil.blob import Array, Nibbles, unpack_nibbles
from gemma_runtime.mil.wire import Damaged

Floats: TypeAlias = NDArray[np.float32]

_BLOCK = 1 << 17  # elements widened at a time, half of a core's cache
_WIDE_BLOCK = 1 << 21  # of a product with several tokens, which BLAS divides among threads
_GEMV = 9000  # elements of a matrix that OpenBLAS multiplies in the calling thread
_SPLIT = np.float32(2**13 + 1)
_SIGN_EXPONENT_FRACTION = np.uint32(0x8FFFE000).view(np.int32)  # where float16's bits end up
_MAX_HALF = 65504
_local = threading.local()


@dataclass(frozen=True, slots=True, eq=False)
class BlockWeight:
    """constexpr_blockwise_shift_scale of a matrix: scale · (code - offset), one of each per block.

    Blocks divide rows and columns evenly.
    """

    codes: Nibbles | Array  # (N, K)
    scale: Floats  # (N or a divisor, a divisor of K)
    offset: Floats | None
    dtype: np.dtype[np.generic]
    is_split_exact: bool  # integers times float16's, within float16's range

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def widen_rows(self, start: int, stop: int, out: Floats) -> None:
        """Rows as float32, each rounded to the declared type first."""
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
    """constexpr_lut_to_dense of a matrix, a scalar per code; a table for each block."""

    codes: Nibbles | Array  # (N, K)
    tables: Array  # (N or a divisor, a divisor of K, entries)
    dtype: np.dtype[np.generic]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def widen_rows(self, start: int, stop: int, out: Floats) -> None:
        """Rows as float32."""
        row_blocks, column_blocks, entries = self.tables.shape
        tables = self.tables.astype(np.float32)
        codes = _code_rows(self.codes, start, stop).astype(np.intp)
        if row_blocks == column_blocks == 1:
            np.take(tables[0, 0], codes, out=out, mode="clip")
            return
        rows = np.arange(start, stop) // (self.shape[0] // row_blocks)
        columns = np.arange(self.shape[1]) // (self.shape[1] // column_blocks)
        places = (rows[:, None] * column_blocks + columns) * entries + codes
        np.take(tables.reshape(-1), places, out=out, mode="clip")


@dataclass(frozen=True, slots=True, eq=False)
class PlainWeight:
    """A matrix stored as it is."""

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
    """Raises Damaged for shapes that don't divide."""
    shift = offset.unpack() if isinstance(offset, Nibbles) else offset
    _check_blocks(codes.shape, scale.shape)
    if shift is not None and shift.shape != scale.shape:
        raise Damaged(f"offsets {shift.shape} beside scales {scale.shape}")
    scales = scale.astype(np.float32)
    largest = float(np.abs(scales).max(initial=0))
    farthest = 256 if shift is None or shift.dtype.kind in "iu" else math.inf
    exact = scale.dtype == np.float16 and largest * farthest < _MAX_HALF
    return BlockWeight(
        codes, scales, None if shift is None else shift.astype(np.float32), dtype, bool(exact)
    )


def open_table_weight(
    codes: Nibbles | Array, tables: Array, dtype: np.dtype[np.generic]
) -> TableWeight:
    """Tables are (…, entries, 1). Raises Damaged for shapes that don't divide, and for vectors."""
    if tables.ndim != len(codes.shape) + 2 or tables.shape[-1] != 1:
        raise Damaged(f"a table {tables.shape}; only scalar entries are known here")
    _check_blocks(codes.shape, tables.shape[:-2])
    return TableWeight(codes, tables[..., 0], dtype)


def dense(weight: Weight) -> Array:
    """The whole matrix in its declared type."""
    if isinstance(weight, PlainWeight):
        return weight.values
    return take_rows(weight, np.arange(weight.shape[0]))


def take_rows(weight: Weight, indices: Array) -> Array:
    """Some rows in the declared type: (…, K)."""
    width = weight.shape[1]
    found = np.empty((indices.size, width), weight.dtype)
    row = np.empty((1, width), np.float32)
    for place, index in enumerate(indices.reshape(-1).tolist()):
        weight.widen_rows(index, index + 1, row)
        found[place] = row
    return found.reshape(*indices.shape, width)


def multiply(x: Floats, weight: Weight, threads: ThreadPoolExecutor, count: int) -> Floats:
    """x @ weight.T, (…, K) to (…, N), by `count` threads."""
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
    """float16 to float32 by moving its bits, four times as fast as numpy's own; finite values."""
    if weight.dtype != np.float16:
        return weight.astype(np.float32)
    bits = weight.view(np.int16).astype(np.int32)  # the sign fills the upper half
    bits <<= 13
    bits &= _SIGN_EXPONENT_FRACTION
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)  # from float16's exponent bias to float32's
    return values


def _multiply_vector(x: Floats, weight: Weight, start: int, stop: int, y: Floats) -> None:
    """A stack of small products, so that OpenBLAS starts no threads of its own beside ours."""
    width = len(x)
    few = max(1, _GEMV // width)
    step = max(1, _BLOCK // width // few) * few
    for first in range(start, stop, step):
        last = min(first + step, stop)
        block = _scratch("block", step * width)[: (last - first) * width]
        weight.widen_rows(first, last, block.reshape(last - first, width))
        whole = (last - first) // few
        stack = block[: whole * few * width].reshape(whole, few, width)
        y[first : first + whole * few] = (stack @ x).reshape(-1)
        if whole * few < last - first:
            y[first + whole * few : last] = block[whole * few * width :].reshape(-1, width) @ x


def _widen_wide(
    weight: Weight, start: int, stop: int, threads: ThreadPoolExecutor, count: int
) -> Floats:
    width = weight.shape[1]
    out = _scratch("wide", (stop - start) * width).reshape(-1, width)
    step = max(1, _BLOCK // width)
    parts = [(first, min(first + step, stop)) for first in range(start, stop, step)]

    def widen_some(mine: Sequence[tuple[int, int]]) -> None:
        for first, last in mine:
            weight.widen_rows(first, last, out[first - start : last - start])

    list(threads.map(widen_some, [parts[part::count] for part in range(count)]))
    return out


def _round_to_half(values: Floats, is_split_exact: bool) -> None:
    """In place. Veltkamp's split keeps float16's eleven bits, ties to even as IEEE 754 rounds.

    Below float16's normal range nothing is to be rounded: an integer times a float16 is a multiple
    of its smallest step. Every product with integers up to 255 was compared.
    """
    if not is_split_exact:
        with np.errstate(over="ignore"):  # what overflows does so on a device too
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
    """Nibbles as two's complement."""
    return (values.astype(np.uint8) ^ 8).astype(np.int8) - np.int8(8) if signed else values


@cache
def _quads(signed: bool) -> NDArray[np.complex128]:
    """Four codes as float32 for each value of two bytes, as items of 16 bytes."""
    two_bytes = np.arange(1 << 16, dtype="<u2").view(np.uint8)
    return unpack_nibbles(two_bytes, signed).astype(np.float32).view(np.complex128)


def _scratch(name: str, size: int) -> Floats:
    """This thread's own, used again: fresh memory costs more than what is done in it."""
    held: Floats | None = getattr(_local, name, None)
    if held is None or held.size < size:
        held = np.empty(size, np.float32)
        setattr(_local, name, held)
    return held[:size]


def _check_blocks(shape: tuple[int, ...], blocks: tuple[int, ...]) -> None:
    if len(shape) != len(blocks) or any(
        b == 0 or size % b for size, b in zip(shape, blocks, strict=True)
    ):
        raise Damaged(f"blocks {blocks} don't divide a weight of {shape}")
