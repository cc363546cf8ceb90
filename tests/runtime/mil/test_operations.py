"""Compares each operation with coremltools' constant folding, or with torch if it folds nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gemma_runtime.mil
from gemma_runtime.mil.ops import KNOWN, OPERATIONS
from gemma_runtime.quiet import quiet

with quiet():
    ct = pytest.importorskip("coremltools")
    torch = pytest.importorskip("torch")
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function

Rng = np.random.Generator
Arguments = dict[str, Any]
SEEDS = st.integers(0, 2**32 - 1)


def words(text: str) -> list[str]:
    return text.split()


def normal(rng: Rng, *shape: int) -> Any:
    return rng.standard_normal(shape).astype(np.float32)


def shape_of(rng: Rng, low: int = 1, rank: int = 4) -> tuple[int, ...]:
    return tuple(rng.integers(low, 5, rng.integers(1, rank + 1)).tolist())


def unary(rng: Rng) -> Arguments:
    return {"x": normal(rng, *shape_of(rng))}


def positive(rng: Rng) -> Arguments:
    return {"x": np.abs(normal(rng, *shape_of(rng))) + np.float32(0.1)}


def pair(rng: Rng) -> tuple[Any, Any]:
    """Two tensors whose shapes broadcast."""
    shape = shape_of(rng)
    other = [1 if rng.random() < 0.3 else n for n in shape][int(rng.integers(0, len(shape))) :]
    return normal(rng, *shape), normal(rng, *other)


def binary(rng: Rng) -> Arguments:
    x, y = pair(rng)
    return {"x": x, "y": np.where(np.abs(y) < 0.1, np.float32(0.5), y).astype(np.float32)}


def whole(rng: Rng) -> Arguments:
    x, y = pair(rng)
    y = np.round(y * 5).astype(np.int32)
    return {"x": np.round(x * 20).astype(np.int32), "y": np.where(y == 0, np.int32(-3), y)}


def power(rng: Rng) -> Arguments:
    x, y = pair(rng)
    return {"x": np.abs(x) + np.float32(0.1), "y": y}


def truth(rng: Rng) -> Arguments:
    x, y = pair(rng)
    return {"x": x > 0, "y": y > 0}


def axis_of(rng: Rng, x: Any) -> int:
    return int(rng.integers(-x.ndim, x.ndim))


def reduction(rng: Rng) -> Arguments:
    x = normal(rng, *shape_of(rng))
    count = int(rng.integers(1, x.ndim + 1))
    axes = rng.permutation(x.ndim)[:count]
    axes = np.where(rng.random(count) < 0.5, axes - x.ndim, axes)
    return {"x": x, "axes": axes.astype(np.int32), "keep_dims": bool(rng.random() < 0.5)}


def place(rng: Rng) -> Arguments:
    x = normal(rng, *shape_of(rng))
    return {"x": x, "axis": axis_of(rng, x), "keep_dims": bool(rng.random() < 0.5)}


def along(rng: Rng) -> Arguments:
    x = normal(rng, *shape_of(rng))
    return {"x": x, "axis": axis_of(rng, x)}


def concat(rng: Rng) -> Arguments:
    x = normal(rng, *shape_of(rng))
    return {"values": [x, x + 1, x * 2], "axis": axis_of(rng, x)}


def split(rng: Rng) -> Arguments:
    sizes = rng.integers(1, 4, 3).astype(np.int32)
    x = normal(rng, 2, int(sizes.sum()), 3)
    return {"x": x, "split_sizes": sizes, "axis": int(rng.choice([1, -2]))}


def even_split(rng: Rng) -> Arguments:
    return {"x": normal(rng, 4, 6), "num_splits": 2, "axis": int(rng.choice([0, 1, -1, -2]))}


def reshape(rng: Rng) -> Arguments:
    shape = [[6, -1], [0, -1], [-1, 0, 4], [2, 12], [0, 0, 0]][int(rng.integers(0, 5))]
    x = normal(rng, 2, 3, 4) if len(shape) != 3 or shape[0] == 0 else normal(rng, 6, 1, 4)
    return {"x": x, "shape": np.array(shape, np.int32)}


def transpose(rng: Rng) -> Arguments:
    x = normal(rng, *shape_of(rng))
    perm = rng.permutation(x.ndim)
    return {"x": x, "perm": np.where(rng.random(x.ndim) < 0.5, perm - x.ndim, perm).astype("i4")}


def tile(rng: Rng) -> Arguments:
    x = normal(rng, *shape_of(rng))
    return {"x": x, "reps": rng.integers(1, 4, x.ndim).astype(np.int32)}


def expand(rng: Rng) -> Arguments:
    x = normal(rng, *shape_of(rng, rank=3))
    return {"x": x, "axes": np.array([int(rng.choice([0, -1, 1]))], np.int32)}


def squeeze(rng: Rng) -> Arguments:
    return {"x": normal(rng, 2, 1, 3, 1), "axes": np.array([int(rng.choice([1, -1, -3]))], "i4")}


def sliced(rng: Rng) -> Arguments:
    """Slices with negative ends, masks, strides and squeezed axes."""
    x = normal(rng, 5, 6, 7)
    begin = rng.integers(0, 3, 3)
    end = np.array([int(rng.integers(b + 1, n + 1)) for b, n in zip(begin, x.shape, strict=True)])
    single = np.array([rng.random() < 0.3, rng.random() < 0.3, False])
    from_end = (rng.random(3) < 0.5) & (end < x.shape)
    return {
        "x": x,
        "begin": np.where(rng.random(3) < 0.5, begin - x.shape, begin).astype(np.int32),
        "end": np.where(from_end, end - x.shape, end).astype(np.int32),
        "stride": np.where(single, 1, rng.integers(1, 3, 3)).astype(np.int32),
        "begin_mask": (rng.random(3) < 0.3) & ~single,
        "end_mask": rng.random(3) < 0.3,
        "squeeze_mask": single,
    }


def sized(rng: Rng) -> Arguments:
    size = rng.choice([-1, 1, 2], 3).astype(np.int32)
    return {"x": normal(rng, 4, 5, 6), "begin": rng.integers(0, 3, 3).astype("i4"), "size": size}


def gather(rng: Rng) -> Arguments:
    x = normal(rng, *rng.integers(2, 5, 3).tolist())
    axis = axis_of(rng, x)
    size = x.shape[axis]
    shape = shape_of(rng, rank=2)
    return {"x": x, "indices": rng.integers(0, size, shape).astype(np.int32), "axis": axis}


def gather_along(rng: Rng) -> Arguments:
    x = normal(rng, 3, 4, 5)
    axis = axis_of(rng, x)
    shape = list(x.shape)
    shape[axis] = int(rng.integers(1, 6))
    indices = rng.integers(0, x.shape[axis], shape).astype(np.int32)
    return {"x": x, "indices": indices, "axis": axis}


def select(rng: Rng) -> Arguments:
    x = normal(rng, *shape_of(rng))
    return {"cond": x > 0, "a": x, "b": -2 * x}


def pad(rng: Rng) -> Arguments:
    amounts = np.array([0, 0, *rng.integers(0, 3, 4)], np.int32)
    mode = str(rng.choice(["constant", "reflect", "replicate"]))
    extra = {"constant_val": np.float32(1.5)} if mode == "constant" else {}
    return {"x": normal(rng, 2, 4, 5), "pad": amounts, "mode": mode, **extra}


FOLDED: list[tuple[str, Callable[[Rng], Arguments]]] = [
    *(
        (kind, unary)
        for kind in [
            "abs",
            "ceil",
            "cos",
            "erf",
            "exp",
            "exp2",
            "floor",
            "relu",
            "round",
            "sigmoid",
            "sign",
            "sin",
            "softplus",
            "square",
            "tan",
            "tanh",
            "shape",
            "identity",
        ]
    ),
    *((kind, positive) for kind in ["sqrt", "rsqrt", "log", "inverse"]),
    *(
        (kind, lambda rng: {**unary(rng), "alpha": np.float32(0.3)})
        for kind in ("elu", "leaky_relu")
    ),
    ("clip", lambda rng: {**unary(rng), "alpha": np.float32(-0.3), "beta": np.float32(0.5)}),
    *(
        (kind, binary)
        for kind in [
            "add",
            "sub",
            "mul",
            "real_div",
            "floor_div",
            "maximum",
            "minimum",
            "mod",
            "equal",
            "not_equal",
            "less",
            "less_equal",
            "greater",
            "greater_equal",
        ]
    ),
    *((k, whole) for k in words("add sub mul real_div floor_div mod maximum equal less")),
    ("pow", power),
    *((kind, truth) for kind in ["logical_and", "logical_or", "logical_xor"]),
    ("logical_not", lambda rng: {"x": unary(rng)["x"] > 0}),
    *(
        (f"reduce_{kind}", reduction)
        for kind in [
            "max",
            "min",
            "mean",
            "sum",
            "prod",
            "l1_norm",
            "l2_norm",
            "log_sum_exp",
            "sum_square",
        ]
    ),
    *((kind, place) for kind in ("reduce_argmax", "reduce_argmin")),
    ("softmax", along),
    ("concat", concat),
    ("stack", concat),
    ("split", split),
    ("split", even_split),
    ("reshape", reshape),
    ("transpose", transpose),
    ("tile", tile),
    ("expand_dims", expand),
    ("squeeze", squeeze),
    ("slice_by_index", sliced),
    ("slice_by_size", sized),
    ("gather", gather),
    ("gather_along_axis", gather_along),
    ("select", select),
    ("pad", pad),
    ("reverse", lambda rng: {"x": normal(rng, 3, 4), "axes": np.array([-1], np.int32)}),
    ("fill", lambda rng: {"shape": np.array([2, 3], "i4"), "value": normal(rng, 1)[0]}),
    ("range_1d", lambda rng: {"start": 1, "end": int(rng.integers(2, 40)), "step": 3}),
    ("cast", lambda rng: {"x": normal(rng, 4) * 20, "dtype": str(rng.choice(["int32", "fp16"]))}),
    (
        "band_part",
        lambda rng: {
            "x": normal(rng, 2, 5, 6),
            "lower": int(rng.integers(-1, 4)),
            "upper": int(rng.integers(-1, 4)),
        },
    ),
    (
        "gelu",
        lambda rng: {
            **unary(rng),
            "mode": str(rng.choice(["EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"])),
        },
    ),
    ("layer_norm", lambda rng: {"x": normal(rng, 3, 8), "axes": np.array([-1], np.int32)}),
    (
        "matmul",
        lambda rng: {"x": normal(rng, 2, 3, 4), "y": normal(rng, 5, 4), "transpose_y": True},
    ),
]


def folded(kind: str, arguments: Arguments) -> list[Any]:
    with quiet(), Function({}, ct.target.iOS18):
        results = getattr(mb, kind)(**arguments)
        return [var.val for var in (results if isinstance(results, list | tuple) else [results])]


def ours(kind: str, arguments: Arguments) -> list[Any]:
    prepared = {
        key: value if isinstance(value, str | list) else np.asarray(value)
        for key, value in arguments.items()
    }
    results = OPERATIONS[kind](prepared)
    return results if isinstance(results, list) else [results]


@pytest.mark.parametrize(
    ("kind", "make"), FOLDED, ids=[f"{k}-{m.__name__.strip('<>')}" for k, m in FOLDED]
)
@settings(max_examples=12, deadline=None)
@given(seed=SEEDS)
def test_an_operation_computes_what_coremltools_folds(
    kind: str, make: Callable[[Rng], Arguments], seed: int
) -> None:
    arguments = make(np.random.default_rng(seed))
    expected, actual = folded(kind, arguments), ours(kind, arguments)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert b is not None, "coremltools folds nothing here"
        assert a.shape == np.shape(b)
        assert np.allclose(a.astype(np.asarray(b).dtype), b, rtol=2e-5, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_scatters_and_attention_compute_what_torch_computes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data, axis = normal(rng, 4, 5, 6), int(rng.integers(-3, 3))
    indices = rng.integers(0, data.shape[axis], (4, 5, 6))
    indices = np.argsort(normal(rng, 4, 5, 6), axis)  # no index twice, so order doesn't matter
    updates = normal(rng, 4, 5, 6)
    given_ = {"data": data, "indices": indices, "updates": updates, "axis": np.array(axis)}
    expected = torch.tensor(data).scatter(axis, torch.tensor(indices), torch.tensor(updates))
    negative = {**given_, "indices": indices - data.shape[axis]}
    for arguments in (given_, negative):
        (actual,) = ours("scatter_along_axis", {**arguments, "mode": "update"})
        assert np.array_equal(actual, expected.numpy())
    (actual,) = ours("scatter_along_axis", {**given_, "mode": "add"})
    added = torch.tensor(data).scatter_add(axis, torch.tensor(indices), torch.tensor(updates))
    assert np.allclose(actual, added.numpy())

    rows = rng.integers(0, 4, 7)
    more = normal(rng, 7, 5, 6)
    (actual,) = ours("scatter", {"data": data, "indices": rows, "updates": more, "axis": 0})
    summed = torch.tensor(data).index_add(0, torch.tensor(rows), torch.tensor(more))
    assert np.allclose(actual, summed.numpy(), atol=1e-5)
    (actual,) = ours("scatter_nd", {"data": data, "indices": rows[:, None], "updates": more})
    assert np.allclose(actual, summed.numpy(), atol=1e-5)
    places = rng.integers(0, 4, (3, 2))
    (actual,) = ours("gather_nd", {"x": data, "indices": places})
    assert np.array_equal(actual, data[places[:, 0], places[:, 1]])
    (actual,) = ours("one_hot", {"indices": rows, "one_hot_vector_size": 4})
    assert np.array_equal(actual, torch.nn.functional.one_hot(torch.tensor(rows), 4).numpy())

    q, k, v, mask = (normal(rng, 2, 3, 4, 5) for _ in range(4))
    mask = mask[..., :4]
    for seen in (mask, mask > -1):
        if seen.dtype == np.bool_:
            seen[..., 0] = True
        attended = torch.nn.functional.scaled_dot_product_attention(
            *map(torch.tensor, (q, k, v)), torch.tensor(seen)
        )
        arguments = {"query": q, "key": k, "value": v, "attn_mask": seen}
        (actual,) = ours("scaled_dot_product_attention", arguments)
        assert np.allclose(actual, attended.numpy(), atol=1e-5)
    backwards, exclusive = bool(seed % 2), bool(seed % 4 > 1)
    x = torch.tensor(data).flip(axis) if backwards else torch.tensor(data)
    sums = x.cumsum(axis) - (x if exclusive else 0)
    sums = sums.flip(axis) if backwards else sums
    flags = {"reverse": np.array(backwards), "exclusive": np.array(exclusive)}
    (actual,) = ours("cumsum", {"x": data, "axis": np.array(axis), **flags})
    assert np.allclose(actual, sums.numpy(), atol=1e-5)
    (actual,) = ours("silu", {"x": q})
    assert np.allclose(actual, torch.nn.functional.silu(torch.tensor(q)).numpy(), atol=1e-6)


TESTED = {kind for kind, _ in FOLDED} | {
    *("scatter", "scatter_along_axis", "scatter_nd", "gather_nd", "one_hot", "silu"),
    *("cumsum", "scaled_dot_product_attention"),
    *("slice_update",),  # in test_interpreter.py
    *("constexpr_blockwise_shift_scale", "constexpr_lut_to_dense"),  # in test_weights.py
}


def test_the_module_docstring_lists_the_supported_operations() -> None:
    listed = (gemma_runtime.mil.__doc__ or "").rpartition(":\n\n")[2]
    assert listed.replace("\n", " ").split() == [f"{k}," for k in ("const", *KNOWN[:-1])] + [
        KNOWN[-1]
    ]


def test_every_operation_is_tested() -> None:
    assert set(OPERATIONS) == TESTED
