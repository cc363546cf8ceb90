"""The operations of MIL that are known here, in numpy.

Floats are computed in float32; whoever calls rounds the result to the type the program declares,
as a device that stores float16 would. Names and meanings are those of coremltools' MIL reference.
"""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.mil.arguments import (
    Arguments,
    Operation,
    array,
    flag,
    floats,
    integer,
    integers,
    number,
    numeric,
    text,
)
from gemma_runtime.mil.blob import Array, Nibbles
from gemma_runtime.mil.model import check_elements
from gemma_runtime.mil.moving import MOVING_OPERATIONS
from gemma_runtime.mil.weights import Floats
from gemma_runtime.mil.wire import Damaged

_Number = TypeVar("_Number", bound=np.generic)
_erf = np.frompyfunc(math.erf, 1, 1)


def _unary(function: Callable[[Floats], Array]) -> Operation:
    return lambda arguments: function(floats(arguments, "x"))


def _whole(function: Callable[..., Array]) -> Operation:
    """Of one argument, and exact for whole numbers."""
    return lambda arguments: function(numeric(arguments, "x"))


def _binary(function: Callable[..., Array]) -> Operation:
    def apply(arguments: Arguments) -> Array:
        x, y = numeric(arguments, "x"), numeric(arguments, "y")
        check_elements("a result", np.broadcast_shapes(x.shape, y.shape))
        return function(x, y)

    return apply


def _reduction(function: Callable[..., Array]) -> Operation:
    def reduce(arguments: Arguments) -> Array:
        x = numeric(arguments, "x")
        axes = integers(arguments, "axes") if "axes" in arguments else tuple(range(x.ndim))
        return function(x, axis=axes, keepdims=flag(arguments, "keep_dims"))

    return reduce


def _place_of(function: Callable[..., Array]) -> Operation:
    def reduce(arguments: Arguments) -> Array:
        axis = integer(arguments, "axis", -1)
        return function(array(arguments, "x"), axis, keepdims=flag(arguments, "keep_dims"))

    return reduce


def _l1(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    return cast(Array, np.abs(x).sum(axis, keepdims=keepdims))


def _sum_square(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    return cast(Array, np.square(x).sum(axis, keepdims=keepdims))


def _l2(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    return cast(Array, np.sqrt(_sum_square(x, axis, keepdims)))


def _log_sum_exp(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    largest = x.max(axis, keepdims=True)
    found: Array = np.log(np.exp(x - largest).sum(axis, keepdims=True)) + largest
    return found if keepdims else np.squeeze(found, axis)


def _mean(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    return cast(Array, x.astype(np.float32).mean(axis, keepdims=keepdims))


def _sigmoid(x: Floats) -> Floats:
    return cast(Floats, 1 / (1 + np.exp(-x)))


def _softplus(x: Floats) -> Floats:
    return cast(Floats, np.logaddexp(x, np.float32(0)))


def _rsqrt(arguments: Arguments) -> Array:
    return cast(Array, 1 / np.sqrt(floats(arguments, "x") + number(arguments, "epsilon", 1e-12)))


def _inverse(arguments: Arguments) -> Array:
    return cast(Array, 1 / (floats(arguments, "x") + number(arguments, "epsilon", 1e-4)))


def _log(arguments: Arguments) -> Array:
    return cast(Array, np.log(floats(arguments, "x") + number(arguments, "epsilon", 1e-45)))


def _clip(arguments: Arguments) -> Array:
    x = floats(arguments, "x")
    return np.minimum(np.maximum(x, number(arguments, "alpha")), number(arguments, "beta"))


def _leaky_relu(arguments: Arguments) -> Array:
    x = floats(arguments, "x")
    return np.where(x >= 0, x, x * number(arguments, "alpha", 0.01))


def _elu(arguments: Arguments) -> Array:
    x = floats(arguments, "x")
    return np.where(x >= 0, x, number(arguments, "alpha", 1.0) * np.expm1(np.minimum(x, 0)))


def _softmax(arguments: Arguments) -> Array:
    return _shares(floats(arguments, "x"), integer(arguments, "axis", -1))


def _shares(x: Floats, axis: int) -> Floats:
    shares = np.exp(x - x.max(axis, keepdims=True))
    return cast(Floats, shares / shares.sum(axis, keepdims=True))


def _gelu(arguments: Arguments) -> Array:
    mode, x = text(arguments, "mode", "EXACT"), floats(arguments, "x")
    if mode == "TANH_APPROXIMATION":
        cube = x * x * x  # numpy's power takes forty times as long
        return cast(Array, 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * cube))))
    if mode == "SIGMOID_APPROXIMATION":
        return x * _sigmoid(1.702 * x)
    if mode == "EXACT":
        return cast(Array, 0.5 * x * (1 + _error_function(x / np.float32(2**0.5))))
    raise Damaged(f"gelu's mode {mode} is not known here")


def _error_function(x: Floats) -> Floats:
    return cast(Floats, np.asarray(_erf(x)).astype(np.float32))


def _layer_norm(arguments: Arguments) -> Array:
    x = floats(arguments, "x")
    axes = integers(arguments, "axes") if "axes" in arguments else tuple(range(x.ndim))
    centred = x - x.mean(axes, keepdims=True)
    variance = np.square(centred).mean(axes, keepdims=True)
    y: Floats = centred / np.sqrt(variance + number(arguments, "epsilon", 1e-5))
    last = sorted(axis % x.ndim for axis in axes)
    shape = [size if axis in last else 1 for axis, size in enumerate(x.shape)]
    if "gamma" in arguments:
        y *= floats(arguments, "gamma").reshape(shape)
    return y + floats(arguments, "beta").reshape(shape) if "beta" in arguments else y


def _matmul(arguments: Arguments) -> Array:
    x, y = floats(arguments, "x"), floats(arguments, "y")
    x = x.swapaxes(-1, -2) if flag(arguments, "transpose_x") else x
    y = y.swapaxes(-1, -2) if flag(arguments, "transpose_y") else y
    if x.ndim > 1 and y.ndim > 1:
        batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        check_elements("a product", (*batch, x.shape[-2], y.shape[-1]))
    return cast(Array, x @ y)


def _attention(arguments: Arguments) -> Array:
    """scaled_dot_product_attention; a mask is added, or where it is of bools says what is seen."""
    query, key = floats(arguments, "query"), floats(arguments, "key")
    scores = query @ key.swapaxes(-1, -2) / np.float32(query.shape[-1] ** 0.5)
    if "attn_mask" in arguments:
        mask = array(arguments, "attn_mask")
        hidden = np.float32(-np.inf)
        is_seen = mask.dtype == np.bool_
        scores = np.where(mask, scores, hidden) if is_seen else scores + mask.astype(np.float32)
    return cast(Array, _shares(scores, -1) @ floats(arguments, "value"))


def dequantize_blocks(arguments: Arguments) -> Array:
    """constexpr_blockwise_shift_scale: scale · (data - offset), a scale for each block."""
    data, scale = array(arguments, "data"), floats(arguments, "scale")
    values = data.astype(np.float32)
    if "offset" in arguments:
        values -= _spread(floats(arguments, "offset"), data.shape)
    values *= _spread(scale, data.shape)
    return values


def look_up(arguments: Arguments) -> Array:
    """constexpr_lut_to_dense with scalar entries: indices into tables, (…, entries, 1)."""
    given = arguments.get("indices")
    indices = given.unpack() if isinstance(given, Nibbles) else array(arguments, "indices")
    tables = array(arguments, "lut")
    if tables.ndim != indices.ndim + 2 or tables.shape[-1] != 1:
        raise Damaged(f"a table {tables.shape}; only scalar entries are known here")
    blocks = np.arange(math.prod(tables.shape[:-2])).reshape(tables.shape[:-2])
    places = _spread(blocks, indices.shape) * tables.shape[-2] + indices
    return cast(Array, np.take(tables, places))


def _spread(small: NDArray[_Number], shape: tuple[int, ...]) -> NDArray[_Number]:
    """Repeat each entry over its block."""
    if small.ndim != len(shape) or any(
        n == 0 or size % n for size, n in zip(shape, small.shape, strict=True)
    ):
        raise Damaged(f"blocks {small.shape} don't divide a weight of {shape}")
    for axis, size in enumerate(shape):
        small = np.repeat(small, size // small.shape[axis], axis)
    return small


# `linear` and the states are the interpreter's own: they need its threads and its memory.
OWN = frozenset({"linear", "read_state", "write_state"})
# Their results hold nothing that their inputs don't.
MOVING = frozenset(MOVING_OPERATIONS) - {"cast", "cumsum"}
OPERATIONS: Mapping[str, Operation] = {
    "abs": _whole(np.abs),
    "add": _binary(np.add),
    "ceil": _whole(np.ceil),
    "clip": _clip,
    "constexpr_blockwise_shift_scale": dequantize_blocks,
    "constexpr_lut_to_dense": look_up,
    "cos": _unary(np.cos),
    "elu": _elu,
    "equal": _binary(np.equal),
    "erf": _unary(_error_function),
    "exp": _unary(np.exp),
    "exp2": _unary(np.exp2),
    "floor": _whole(np.floor),
    "floor_div": _binary(np.floor_divide),
    "gelu": _gelu,
    "greater": _binary(np.greater),
    "greater_equal": _binary(np.greater_equal),
    "inverse": _inverse,
    "layer_norm": _layer_norm,
    "leaky_relu": _leaky_relu,
    "less": _binary(np.less),
    "less_equal": _binary(np.less_equal),
    "log": _log,
    "logical_and": _binary(np.logical_and),
    "logical_not": lambda a: np.logical_not(array(a, "x")),
    "logical_or": _binary(np.logical_or),
    "logical_xor": _binary(np.logical_xor),
    "matmul": _matmul,
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "mod": _binary(np.mod),
    "mul": _binary(np.multiply),
    "not_equal": _binary(np.not_equal),
    "pow": _binary(np.power),
    "real_div": _binary(np.true_divide),
    "reduce_argmax": _place_of(np.argmax),
    "reduce_argmin": _place_of(np.argmin),
    "reduce_l1_norm": _reduction(_l1),
    "reduce_l2_norm": _reduction(_l2),
    "reduce_log_sum_exp": _reduction(_log_sum_exp),
    "reduce_max": _reduction(np.max),
    "reduce_mean": _reduction(_mean),
    "reduce_min": _reduction(np.min),
    "reduce_prod": _reduction(np.prod),
    "reduce_sum": _reduction(np.sum),
    "reduce_sum_square": _reduction(_sum_square),
    "relu": _unary(lambda x: np.maximum(x, 0)),
    "round": _whole(np.round),
    "rsqrt": _rsqrt,
    "scaled_dot_product_attention": _attention,
    "sigmoid": _unary(_sigmoid),
    "sign": _whole(np.sign),
    "silu": _unary(lambda x: x * _sigmoid(x)),
    "sin": _unary(np.sin),
    "softmax": _softmax,
    "softplus": _unary(_softplus),
    "sqrt": _unary(np.sqrt),
    "square": _whole(np.square),
    "sub": _binary(np.subtract),
    "tan": _unary(np.tan),
    "tanh": _unary(np.tanh),
    **MOVING_OPERATIONS,
}
KNOWN = tuple(sorted({*OPERATIONS, *OWN}))
