"""The supported MIL operations, in numpy.

Floating-point operations compute in float32; the caller rounds the result to the declared type, as
a device that stores float16 does. Names and semantics are those of coremltools' MIL reference.
"""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.formats.protobuf import Damaged
from gemma_runtime.mil.arguments import (
    Arguments,
    Kernel,
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

_Number = TypeVar("_Number", bound=np.generic)
_erf = np.frompyfunc(math.erf, 1, 1)


def _unary(function: Callable[[Floats], Array]) -> Kernel:
    return lambda arguments: function(floats(arguments, "x"))


def _exact_unary(function: Callable[..., Array]) -> Kernel:
    """A kernel with one argument that computes integers exactly, without float32."""
    return lambda arguments: function(numeric(arguments, "x"))


def _binary(function: Callable[..., Array]) -> Kernel:
    def apply(arguments: Arguments) -> Array:
        x, y = numeric(arguments, "x"), numeric(arguments, "y")
        check_elements("the result", np.broadcast_shapes(x.shape, y.shape))
        return function(x, y)

    return apply


def _reduction(function: Callable[..., Array]) -> Kernel:
    def reduce(arguments: Arguments) -> Array:
        x = numeric(arguments, "x")
        axes = integers(arguments, "axes") if "axes" in arguments else tuple(range(x.ndim))
        return function(x, axis=axes, keepdims=flag(arguments, "keep_dims"))

    return reduce


def _arg_reduction(function: Callable[..., Array]) -> Kernel:
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
    result: Array = np.log(np.exp(x - largest).sum(axis, keepdims=True)) + largest
    return result if keepdims else np.squeeze(result, axis)


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
    return _stable_softmax(floats(arguments, "x"), integer(arguments, "axis", -1))


def _stable_softmax(x: Floats, axis: int) -> Floats:
    exponentials = np.exp(x - x.max(axis, keepdims=True))
    return cast(Floats, exponentials / exponentials.sum(axis, keepdims=True))


def _gelu(arguments: Arguments) -> Array:
    mode, x = text(arguments, "mode", "EXACT"), floats(arguments, "x")
    if mode == "TANH_APPROXIMATION":
        cube = x * x * x  # x**3 takes numpy forty times as long
        return cast(Array, 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * cube))))
    if mode == "SIGMOID_APPROXIMATION":
        return x * _sigmoid(1.702 * x)
    if mode == "EXACT":
        return cast(Array, 0.5 * x * (1 + _error_function(x / np.float32(2**0.5))))
    raise Damaged(f"gelu mode {mode!r} is not supported")


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
        check_elements("the product", (*batch, x.shape[-2], y.shape[-1]))
    return cast(Array, x @ y)


def _attention(arguments: Arguments) -> Array:
    """scaled_dot_product_attention. A float mask is added; a bool mask is True where visible."""
    query, key = floats(arguments, "query"), floats(arguments, "key")
    scores = query @ key.swapaxes(-1, -2) / np.float32(query.shape[-1] ** 0.5)
    if "attn_mask" in arguments:
        mask = array(arguments, "attn_mask")
        masked = np.float32(-np.inf)
        is_bool = mask.dtype == np.bool_
        scores = np.where(mask, scores, masked) if is_bool else scores + mask.astype(np.float32)
    return cast(Array, _stable_softmax(scores, -1) @ floats(arguments, "value"))


def dequantize_blocks(arguments: Arguments) -> Array:
    """constexpr_blockwise_shift_scale: scale · (data - offset), with one scale per block."""
    data, scale = array(arguments, "data"), floats(arguments, "scale")
    values = data.astype(np.float32)
    if "offset" in arguments:
        values -= _repeat_blocks(floats(arguments, "offset"), data.shape)
    values *= _repeat_blocks(scale, data.shape)
    return values


def look_up(arguments: Arguments) -> Array:
    """constexpr_lut_to_dense with scalar entries: look indices up in tables, (…, entries, 1)."""
    packed = arguments.get("indices")
    indices = packed.unpack() if isinstance(packed, Nibbles) else array(arguments, "indices")
    tables = array(arguments, "lut")
    if tables.ndim != indices.ndim + 2 or tables.shape[-1] != 1:
        raise Damaged(f"a lookup table has the shape {tables.shape}; only scalar entries work")
    blocks = np.arange(math.prod(tables.shape[:-2])).reshape(tables.shape[:-2])
    positions = _repeat_blocks(blocks, indices.shape) * tables.shape[-2] + indices
    return cast(Array, np.take(tables, positions))


def _repeat_blocks(small: NDArray[_Number], shape: tuple[int, ...]) -> NDArray[_Number]:
    """Repeat each block's entry so that the result has `shape`."""
    if small.ndim != len(shape) or any(
        n == 0 or size % n for size, n in zip(shape, small.shape, strict=True)
    ):
        raise Damaged(f"blocks {small.shape} don't divide a weight of {shape}")
    for axis, size in enumerate(shape):
        small = np.repeat(small, size // small.shape[axis], axis)
    return small


# The interpreter implements these itself: they need its threads and its states.
BUILT_IN = frozenset({"linear", "read_state", "write_state"})
# Operations that compute no new values: every value of the result is in the inputs.
MOVING = frozenset(MOVING_OPERATIONS) - {"cast", "cumsum"}
OPERATIONS: Mapping[str, Kernel] = {
    "abs": _exact_unary(np.abs),
    "add": _binary(np.add),
    "ceil": _exact_unary(np.ceil),
    "clip": _clip,
    "constexpr_blockwise_shift_scale": dequantize_blocks,
    "constexpr_lut_to_dense": look_up,
    "cos": _unary(np.cos),
    "elu": _elu,
    "equal": _binary(np.equal),
    "erf": _unary(_error_function),
    "exp": _unary(np.exp),
    "exp2": _unary(np.exp2),
    "floor": _exact_unary(np.floor),
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
    "reduce_argmax": _arg_reduction(np.argmax),
    "reduce_argmin": _arg_reduction(np.argmin),
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
    "round": _exact_unary(np.round),
    "rsqrt": _rsqrt,
    "scaled_dot_product_attention": _attention,
    "sigmoid": _unary(_sigmoid),
    "sign": _exact_unary(np.sign),
    "silu": _unary(lambda x: x * _sigmoid(x)),
    "sin": _unary(np.sin),
    "softmax": _softmax,
    "softplus": _unary(_softplus),
    "sqrt": _unary(np.sqrt),
    "square": _exact_unary(np.square),
    "sub": _binary(np.subtract),
    "tan": _unary(np.tan),
    "tanh": _unary(np.tanh),
    **MOVING_OPERATIONS,
}
KNOWN = tuple(sorted({*OPERATIONS, *BUILT_IN}))
