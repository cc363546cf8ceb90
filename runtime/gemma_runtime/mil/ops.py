"""The operations of MIL that our programs use, in numpy.

Floats are computed in float32; whoever calls rounds the result to the type the program declares,
as a device that stores float16 would. Names and meanings are those of coremltools' MIL reference.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.errors import SessionError
from gemma_runtime.machine import physical_cores
from gemma_runtime.mil.blob import Array
from gemma_runtime.mil.package import Value

Arguments: TypeAlias = Mapping[str, Value]
Result: TypeAlias = Array | list[Array]
Operation: TypeAlias = Callable[[Arguments], Result]
Floats: TypeAlias = NDArray[np.float32]

_BLOCK = 1 << 17  # elements of a weight
_SIGN_EXPONENT_FRACTION = np.uint32(0x8FFFE000).view(np.int32)  # where float16's bits end up
_NAMES = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32, "bool": np.bool_}


def _array(arguments: Arguments, name: str) -> Array:
    return cast(Array, arguments[name])


def _floats(arguments: Arguments, name: str) -> Floats:
    return _array(arguments, name).astype(np.float32)


def _numeric(arguments: Arguments, name: str) -> Array:
    """Float16 widened to float32; whole numbers as they are."""
    array = _array(arguments, name)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _ints(arguments: Arguments, name: str) -> tuple[int, ...]:
    return tuple(int(n) for n in np.reshape(_array(arguments, name), -1))


def _flag(arguments: Arguments, name: str) -> bool:
    return name in arguments and bool(_array(arguments, name).item())


def _number(arguments: Arguments, name: str, default: float = 0.0) -> float:
    return float(_array(arguments, name).item()) if name in arguments else default


def _unary(function: Callable[[Floats], Array]) -> Operation:
    return lambda arguments: function(_floats(arguments, "x"))


def _binary(function: Callable[..., Array]) -> Operation:
    return lambda arguments: function(_numeric(arguments, "x"), _numeric(arguments, "y"))


def _reduction(function: Callable[..., Array]) -> Operation:
    def reduce(arguments: Arguments) -> Array:
        x = _floats(arguments, "x")
        axes = _ints(arguments, "axes") if "axes" in arguments else tuple(range(x.ndim))
        return function(x, axis=axes, keepdims=_flag(arguments, "keep_dims"))

    return reduce


def _sigmoid(x: Floats) -> Floats:
    return cast(Floats, 1 / (1 + np.exp(-x)))


def _rsqrt(arguments: Arguments) -> Array:
    epsilon = np.float32(_number(arguments, "epsilon", 1e-12))
    return cast(Array, 1 / np.sqrt(_floats(arguments, "x") + epsilon))


def _softmax(arguments: Arguments) -> Array:
    x, axis = _floats(arguments, "x"), int(_number(arguments, "axis", -1))
    shares = np.exp(x - x.max(axis, keepdims=True))
    return cast(Array, shares / shares.sum(axis, keepdims=True))


def _gelu(arguments: Arguments) -> Array:
    mode = arguments.get("mode", "EXACT")
    if mode != "TANH_APPROXIMATION":
        raise SessionError(f"gelu's mode {mode} is not known here; Gemma has TANH_APPROXIMATION")
    x = _floats(arguments, "x")
    return cast(Array, 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3))))


def _linear(arguments: Arguments) -> Array:
    """Weights stay float16: a block of rows is widened at a time, and stays in the cache."""
    x, weight = _floats(arguments, "x"), _array(arguments, "weight")
    y = np.empty((*x.shape[:-1], len(weight)), np.float32)
    step = max(1, _BLOCK // weight.shape[1])

    def multiply(start: int) -> None:
        y[..., start : start + step] = x @ widen(weight[start : start + step]).T

    starts = range(0, len(weight), step)
    if len(starts) == 1:
        multiply(0)
    else:
        with ThreadPoolExecutor(physical_cores()) as threads:
            list(threads.map(multiply, starts))
    return y + _floats(arguments, "bias") if "bias" in arguments else y


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


def _matmul(arguments: Arguments) -> Array:
    x, y = _floats(arguments, "x"), _floats(arguments, "y")
    x = x.swapaxes(-1, -2) if _flag(arguments, "transpose_x") else x
    y = y.swapaxes(-1, -2) if _flag(arguments, "transpose_y") else y
    return cast(Array, x @ y)


def _reshape(arguments: Arguments) -> Array:
    x = _array(arguments, "x")
    shape = _ints(arguments, "shape")
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(shape)])  # 0 keeps it


def _concat(arguments: Arguments) -> Array:
    parts = cast(list[Array], arguments["values"])
    return np.concatenate([np.atleast_1d(part) for part in parts], int(_number(arguments, "axis")))


def _split(arguments: Arguments) -> list[Array]:
    x, axis = _array(arguments, "x"), int(_number(arguments, "axis"))
    if "split_sizes" in arguments:
        return np.split(x, np.cumsum(_ints(arguments, "split_sizes"))[:-1], axis)
    return np.split(x, int(_number(arguments, "num_splits")), axis)


def _gather(arguments: Arguments) -> Array:
    x, indices = _array(arguments, "x"), _array(arguments, "indices").astype(np.int64)
    axis = int(_number(arguments, "axis"))
    if indices.size and int(indices.max()) >= x.shape[axis]:
        raise SessionError(f"gather takes index {indices.max()} of {x.shape[axis]}")
    return np.take(x, indices, axis)


def _region(arguments: Arguments, x: Array) -> tuple[slice | int, ...]:
    """What begin, end, stride and their masks select."""

    def masked(name: str) -> tuple[int, ...]:
        return _ints(arguments, name) if name in arguments else (0,) * x.ndim

    begin, end = _ints(arguments, "begin"), _ints(arguments, "end")
    stride = _ints(arguments, "stride") if "stride" in arguments else (1,) * x.ndim
    no_begin, no_end = masked("begin_mask"), masked("end_mask")
    single = masked("squeeze_mask")
    return tuple(
        begin[d]
        if single[d]
        else slice(None if no_begin[d] else begin[d], None if no_end[d] else end[d], stride[d])
        for d in range(x.ndim)
    )


def _slice_update(arguments: Arguments) -> Array:
    x, update = _array(arguments, "x").copy(), _array(arguments, "update")
    region = _region(arguments, x)
    if x[region].shape != update.shape:  # Core ML doesn't check, and would write elsewhere
        raise SessionError(f"slice_update puts {update.shape} where {x[region].shape} is")
    x[region] = update
    return x


def _scatter_along_axis(arguments: Arguments) -> Array:
    _check_update(arguments)
    data = _array(arguments, "data").copy()
    axis = int(_number(arguments, "axis"))
    indices = _array(arguments, "indices").astype(np.int64)
    if indices.size and int(indices.max()) >= data.shape[axis]:
        raise SessionError(f"scatter_along_axis writes {indices.max()} of {data.shape[axis]}")
    np.put_along_axis(data, indices, _array(arguments, "updates"), axis)
    return data


def _check_update(arguments: Arguments) -> None:
    if arguments.get("mode", "add") != "update":
        raise SessionError(f"a scatter's mode {arguments.get('mode', 'add')} is not known here")


def _squeeze(arguments: Arguments) -> Array:
    axes = _ints(arguments, "axes") if "axes" in arguments else None
    return np.squeeze(_array(arguments, "x"), axes)


def _cast(arguments: Arguments) -> Array:
    return _array(arguments, "x").astype(_NAMES[str(arguments["dtype"])])


def dequantize_blocks(arguments: Arguments) -> Array:
    """constexpr_blockwise_shift_scale: scale · (data - offset), a scale for each block."""
    data, scale = _array(arguments, "data"), _floats(arguments, "scale")
    values = data.astype(np.float32)
    if "offset" in arguments:
        values -= _spread(_floats(arguments, "offset"), data.shape)
    values *= _spread(scale, data.shape)
    return values


def look_up(arguments: Arguments) -> Array:
    """constexpr_lut_to_dense with scalar entries: indices into tables, (…, entries, 1)."""
    indices, tables = _array(arguments, "indices"), _floats(arguments, "lut")[..., 0]
    entries = tables.shape[-1]
    spread = np.stack([_spread(tables[..., e], indices.shape) for e in range(entries)], -1)
    return np.take_along_axis(spread, indices[..., None].astype(np.int64), -1)[..., 0]


def _spread(small: Floats, shape: tuple[int, ...]) -> Floats:
    """Repeat each entry over its block."""
    for axis, size in enumerate(shape):
        repeats = size // small.shape[axis]
        if repeats > 1:
            small = np.repeat(small, repeats, axis)
    return small


# Their results hold nothing that their inputs don't.
MOVING = frozenset(
    {
        "concat",
        "expand_dims",
        "gather",
        "identity",
        "reshape",
        "scatter_along_axis",
        "select",
        "slice_by_index",
        "slice_update",
        "split",
        "squeeze",
        "tile",
        "transpose",
    }
)
OPERATIONS: Mapping[str, Operation] = {
    "abs": _unary(np.abs),
    "add": _binary(np.add),
    "cast": _cast,
    "concat": _concat,
    "constexpr_blockwise_shift_scale": dequantize_blocks,
    "constexpr_lut_to_dense": look_up,
    "cos": _unary(np.cos),
    "exp": _unary(np.exp),
    "expand_dims": lambda a: np.expand_dims(_array(a, "x"), _ints(a, "axes")),
    "gather": _gather,
    "gelu": _gelu,
    "greater_equal": _binary(np.greater_equal),
    "identity": lambda a: _array(a, "x"),
    "less": _binary(np.less),
    "linear": _linear,
    "logical_and": _binary(np.logical_and),
    "matmul": _matmul,
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "mul": _binary(np.multiply),
    "real_div": _binary(np.true_divide),
    "reduce_max": _reduction(np.max),
    "reduce_mean": _reduction(np.mean),
    "reduce_sum": _reduction(np.sum),
    "reshape": _reshape,
    "rsqrt": _rsqrt,
    "scatter_along_axis": _scatter_along_axis,
    "select": lambda a: np.where(_array(a, "cond"), _array(a, "a"), _array(a, "b")),
    "sigmoid": _unary(_sigmoid),
    "sin": _unary(np.sin),
    "slice_by_index": lambda a: _array(a, "x")[_region(a, _array(a, "x"))],
    "slice_update": _slice_update,
    "softmax": _softmax,
    "split": _split,
    "sqrt": _unary(np.sqrt),
    "square": _unary(np.square),
    "squeeze": _squeeze,
    "sub": _binary(np.subtract),
    "tanh": _unary(np.tanh),
    "tile": lambda a: np.tile(_array(a, "x"), _ints(a, "reps")),
    "transpose": lambda a: np.transpose(_array(a, "x"), _ints(a, "perm")),
}
