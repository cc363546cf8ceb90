"""MIL operations that move, select or place values; also cast, cumsum and the scatters."""

import math
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.formats.protobuf import Damaged
from gemma_runtime.mil.arguments import (
    Arguments,
    Kernel,
    array,
    arrays,
    flag,
    integer,
    integers,
    numeric,
    text,
)
from gemma_runtime.mil.blob import Array
from gemma_runtime.mil.model import check_elements
from gemma_runtime.mil.weights import BlockWeight, TableWeight, take_rows

Region = tuple[slice | int, ...]

_DTYPES = {
    "bool": np.bool_,
    "fp16": np.float16,
    "fp32": np.float32,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "uint8": np.uint8,
    "uint16": np.uint16,
}
_PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
_SCATTER_MODES: Mapping[str, Callable[..., None]] = {
    "add": np.add.at,
    "div": np.true_divide.at,
    "max": np.maximum.at,
    "min": np.minimum.at,
    "mul": np.multiply.at,
    "sub": np.subtract.at,
}


def _cast(arguments: Arguments) -> Array:
    name = text(arguments, "dtype", "")
    if name not in _DTYPES:
        raise Damaged(f"cast to {name!r} is not supported; supported: {', '.join(_DTYPES)}")
    return array(arguments, "x").astype(_DTYPES[name])


def _reshape(arguments: Arguments) -> Array:
    """A size of 0 keeps the input's size of that axis, counted from the end; -1 is inferred."""
    x, sizes = array(arguments, "x"), integers(arguments, "shape")
    first = x.ndim - len(sizes)
    current = (*(1,) * -first, *x.shape[max(first, 0) :])
    return x.reshape([c if n == 0 else n for c, n in zip(current, sizes, strict=True)])


def _concat(arguments: Arguments) -> Array:
    axis = integer(arguments, "axis")
    parts = [np.atleast_1d(part) for part in arrays(arguments, "values")]
    if not flag(arguments, "interleave"):
        return np.concatenate(parts, axis)
    stacked = np.stack(parts, axis % parts[0].ndim + 1)
    shape = list(parts[0].shape)
    shape[axis] *= len(parts)
    return stacked.reshape(shape)


def _split(arguments: Arguments) -> list[Array]:
    x, axis = array(arguments, "x"), integer(arguments, "axis")
    if "split_sizes" in arguments:
        sizes = integers(arguments, "split_sizes")
        if min(sizes) < 0 or sum(sizes) != x.shape[axis]:
            raise Damaged(f"can't split {x.shape[axis]} elements into {sizes}")
        return np.split(x, np.cumsum(sizes)[:-1], axis)
    return np.split(x, integer(arguments, "num_splits"), axis)


def _squeeze(arguments: Arguments) -> Array:
    axes = integers(arguments, "axes") if "axes" in arguments else None
    return np.squeeze(array(arguments, "x"), axes)


def _tile(arguments: Arguments) -> Array:
    x, repeats = array(arguments, "x"), integers(arguments, "reps")
    if len(repeats) != x.ndim or min(repeats, default=1) < 0:
        raise Damaged(f"can't tile {x.shape} by {repeats}")
    check_elements("the tiled result", tuple(n * r for n, r in zip(x.shape, repeats, strict=True)))
    return np.tile(x, repeats)


def _region(arguments: Arguments, x: Array) -> Region:
    """The index that begin, end, stride and their masks select, one entry per axis."""

    def entries(name: str, default: int) -> tuple[int, ...]:
        values = integers(arguments, name) if name in arguments else (default,) * x.ndim
        if len(values) != x.ndim:
            raise Damaged(f"{name} has {len(values)} entries for {x.ndim} axes")
        return values

    begin, end, stride = entries("begin", 0), entries("end", 0), entries("stride", 1)
    no_begin, no_end = entries("begin_mask", 0), entries("end_mask", 0)
    single = entries("squeeze_mask", 0)
    return tuple(
        begin[d]
        if single[d]
        else slice(None if no_begin[d] else begin[d], None if no_end[d] else end[d], stride[d])
        for d in range(x.ndim)
    )


def _slice_by_index(arguments: Arguments) -> Array:
    x = array(arguments, "x")
    return np.asarray(x[_region(arguments, x)])


def _slice_by_size(arguments: Arguments) -> Array:
    """A size of -1 selects everything from `begin` on."""
    x = array(arguments, "x")
    begin, size = integers(arguments, "begin"), integers(arguments, "size")
    starts = [b % n if b < 0 else b for b, n in zip(begin, x.shape, strict=True)]
    stops = [n if s == -1 else b + s for b, s, n in zip(starts, size, x.shape, strict=True)]
    return x[tuple(map(slice, starts, stops))]


def _slice_update(arguments: Arguments) -> Array:
    x, update = array(arguments, "x").copy(), array(arguments, "update")
    region = _region(arguments, x)
    if x[region].shape != update.shape:  # Core ML doesn't check this, and writes out of bounds
        raise Damaged(f"writes {update.shape} into a region of {x[region].shape}")
    x[region] = update
    return x


def _pad(arguments: Arguments) -> Array:
    """`pad` holds pairs (before, after) for the last axes."""
    x, amounts = array(arguments, "x"), integers(arguments, "pad")
    mode = text(arguments, "mode", "constant")
    if mode not in _PAD_MODES or len(amounts) > 2 * x.ndim or min(amounts, default=0) < 0:
        raise Damaged(f"can't pad {x.shape} by {amounts} with mode {mode!r}")
    pairs = [(0, 0)] * (x.ndim - len(amounts) // 2)
    pairs += list(zip(amounts[::2], amounts[1::2], strict=True))
    check_elements(
        "the padded result", tuple(n + a + b for n, (a, b) in zip(x.shape, pairs, strict=True))
    )
    if mode == "constant":
        value = array(arguments, "constant_val").item() if "constant_val" in arguments else 0
        return np.pad(x, pairs, "constant", constant_values=value)
    return np.pad(x, pairs, "reflect" if mode == "reflect" else "edge")


def _positions(indices: Array, size: int) -> NDArray[np.int64]:
    """Indices as positions from 0 on; negative ones count from the end.

    Raises Damaged for an index out of range. Core ML doesn't check this, and reads out of bounds.
    """
    positions = indices.astype(np.int64)
    if positions.size and not (-size <= int(positions.min()) and int(positions.max()) < size):
        wrong = positions.max() if positions.max() >= size else positions.min()
        raise Damaged(f"index {wrong} is out of range for {size} elements")
    return np.where(positions < 0, positions + size, positions)


def _gather(arguments: Arguments) -> Array:
    source, indices = arguments.get("x"), array(arguments, "indices")
    axis, batch = integer(arguments, "axis", 0), integer(arguments, "batch_dims", 0)
    if isinstance(source, BlockWeight | TableWeight) and axis in (0, -2) and batch == 0:
        check_elements("the gathered result", (*indices.shape, source.shape[1]))
        return take_rows(source, _positions(indices, source.shape[0]))
    x = array(arguments, "x")
    axis = axis % x.ndim
    positions = _positions(indices, x.shape[axis])
    shape = (*x.shape[:axis], *positions.shape[batch:], *x.shape[axis + 1 :])
    check_elements("the gathered result", shape)
    if batch == 0:
        return np.take(x, positions, axis)
    rows = x.reshape(-1, *x.shape[batch:])
    chosen = positions.reshape(-1, *positions.shape[batch:])
    taken = [np.take(row, p, axis - batch) for row, p in zip(rows, chosen, strict=True)]
    return np.stack(taken).reshape(*x.shape[:batch], *taken[0].shape)


def _gather_along_axis(arguments: Arguments) -> Array:
    x, axis = array(arguments, "x"), integer(arguments, "axis", 0)
    return np.take_along_axis(x, _positions(array(arguments, "indices"), x.shape[axis]), axis)


def _gather_nd(arguments: Arguments) -> Array:
    x, indices = array(arguments, "x"), array(arguments, "indices")
    batch = integer(arguments, "batch_dims", 0)
    if batch == 0:
        return np.asarray(x[_index_tuple(indices, x.shape)])
    rows = x.reshape(-1, *x.shape[batch:])
    chosen = indices.reshape(-1, *indices.shape[batch:])
    taken = [row[_index_tuple(c, row.shape)] for row, c in zip(rows, chosen, strict=True)]
    return np.stack(taken).reshape(*x.shape[:batch], *taken[0].shape)


def _index_tuple(indices: Array, shape: tuple[int, ...]) -> tuple[NDArray[np.int64], ...]:
    """Indices (…, axes) as a numpy index: a tuple of one array per leading axis."""
    return tuple(_positions(indices[..., d], shape[d]) for d in range(indices.shape[-1]))


def _scatter(arguments: Arguments) -> Array:
    data, axis = array(arguments, "data"), integer(arguments, "axis", 0)
    positions = _positions(array(arguments, "indices"), data.shape[axis])
    return _scattered(arguments, (*(slice(None),) * (axis % data.ndim), positions))


def _scatter_along_axis(arguments: Arguments) -> Array:
    data, axis = array(arguments, "data"), integer(arguments, "axis", 0)
    positions = _positions(array(arguments, "indices"), data.shape[axis])
    grid: list[Array] = list(np.ogrid[tuple(slice(n) for n in positions.shape)])
    grid[axis] = positions
    return _scattered(arguments, tuple(grid))


def _scatter_nd(arguments: Arguments) -> Array:
    return _scattered(
        arguments, _index_tuple(array(arguments, "indices"), array(arguments, "data").shape)
    )


def _scattered(arguments: Arguments, positions: tuple[Array | slice, ...]) -> Array:
    mode = text(arguments, "mode", "add")
    if mode == "update":
        data = array(arguments, "data").copy()
        updates = array(arguments, "updates")
    else:
        data, updates = numeric(arguments, "data").copy(), numeric(arguments, "updates")
    if data[positions].shape != updates.shape:
        raise Damaged(f"scatters {updates.shape} into a region of {data[positions].shape}")
    if mode == "update":
        data[positions] = updates
    elif mode in _SCATTER_MODES:
        _SCATTER_MODES[mode](data, positions, updates)
    else:
        raise Damaged(f"scatter mode {mode!r} is not supported")
    return data


def _cumsum(arguments: Arguments) -> Array:
    x, axis = numeric(arguments, "x"), integer(arguments, "axis", 0)
    backwards = flag(arguments, "reverse")
    x = np.flip(x, axis) if backwards else x
    sums = np.cumsum(x, axis, dtype=x.dtype)
    if flag(arguments, "exclusive"):
        first = [slice(None)] * x.ndim
        first[axis] = slice(0, 1)
        sums = np.roll(sums, 1, axis)
        sums[tuple(first)] = 0
    return np.flip(sums, axis) if backwards else sums


def _range(arguments: Arguments) -> Array:
    start, end, step = (numeric(arguments, name) for name in ("start", "end", "step"))
    count = (float(end.item()) - float(start.item())) / float(step.item())
    check_elements("the range", (math.ceil(max(0.0, count)),))
    return np.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


def _fill(arguments: Arguments) -> Array:
    shape, value = integers(arguments, "shape"), array(arguments, "value")
    check_elements("the filled tensor", shape)
    return np.full(shape, value.reshape(()), value.dtype)


def _select(arguments: Arguments) -> Array:
    condition, a, b = (array(arguments, name) for name in ("cond", "a", "b"))
    check_elements("the result", np.broadcast_shapes(condition.shape, a.shape, b.shape))
    return np.where(condition, a, b)


def _one_hot(arguments: Arguments) -> Array:
    indices, size = array(arguments, "indices"), integer(arguments, "one_hot_vector_size")
    on = array(arguments, "on_value") if "on_value" in arguments else np.int32(1)
    off = array(arguments, "off_value") if "off_value" in arguments else np.int32(0)
    check_elements("the result", (*indices.shape, size))
    hot = np.where(indices[..., None] == np.arange(size), on, off)
    return np.moveaxis(hot, -1, integer(arguments, "axis", -1))


def _band_part(arguments: Arguments) -> Array:
    """Keep `lower` diagonals below the main one and `upper` above it; -1 keeps all."""
    x = array(arguments, "x")
    lower, upper = integer(arguments, "lower", -1), integer(arguments, "upper", -1)
    rows, columns = np.ogrid[: x.shape[-2], : x.shape[-1]]
    kept = ((lower < 0) | (rows - columns <= lower)) & ((upper < 0) | (columns - rows <= upper))
    return np.where(kept, x, x.dtype.type(0))


def _reverse(arguments: Arguments) -> Array:
    return np.flip(
        array(arguments, "x"), integers(arguments, "axes") if "axes" in arguments else None
    )


def _shape(arguments: Arguments) -> Array:
    return cast(Array, np.array(array(arguments, "x").shape, np.int32))


MOVING_OPERATIONS: Mapping[str, Kernel] = {
    "band_part": _band_part,
    "cast": _cast,
    "concat": _concat,
    "cumsum": _cumsum,
    "expand_dims": lambda a: np.expand_dims(array(a, "x"), integers(a, "axes")),
    "fill": _fill,
    "gather": _gather,
    "gather_along_axis": _gather_along_axis,
    "gather_nd": _gather_nd,
    "identity": lambda a: array(a, "x"),
    "one_hot": _one_hot,
    "pad": _pad,
    "range_1d": _range,
    "reshape": _reshape,
    "reverse": _reverse,
    "scatter": _scatter,
    "scatter_along_axis": _scatter_along_axis,
    "scatter_nd": _scatter_nd,
    "select": _select,
    "shape": _shape,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
    "split": _split,
    "squeeze": _squeeze,
    "stack": lambda a: np.stack(arrays(a, "values"), integer(a, "axis")),
    "tile": _tile,
    "transpose": lambda a: np.transpose(array(a, "x"), integers(a, "perm")),
}
