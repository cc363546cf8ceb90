"""Our interpreter executes programs that coremltools saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_runtime.errors import SessionError
from gemma_runtime.formats.protobuf import Damaged
from gemma_runtime.mil.audit import Peak
from gemma_runtime.mil.interpreter import Program
from gemma_runtime.mil.ops import OPERATIONS
from gemma_runtime.mil.weights import widen
from gemma_runtime.quiet import quiet

with quiet():
    ct = pytest.importorskip("coremltools")
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.converter import mil_convert
    from coremltools.converters.mil.mil import Program as MilProgram
    from coremltools.converters.mil.mil import types

Body = Callable[..., Any]
F16 = np.float16


def save(path: Path, **functions: tuple[list[Any], Body]) -> Program:
    """Save functions of (input specs, body) as a package, and open it."""
    program = MilProgram()
    with quiet():
        for name, (specs, body) in functions.items():
            program.add_function(
                name, mb.function(input_specs=specs, opset_version=ct.target.iOS18)(body)
            )
        program.default_function_name = next(iter(functions))
        program.export_as_multifunction = True
        model = mil_convert(
            program,
            convert_to="mlprogram",
            convert_from="milinternal",
            specification_version=ct.target.iOS18,
            compute_units=ct.ComputeUnit.CPU_ONLY,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
            export_multi_functions=True,
        )
        model.save(str(path))
    return Program(path)


def half(*shape: int) -> Any:
    return mb.TensorSpec(shape=shape, dtype=types.fp16)


def run(program: Program, function: str = "main", **inputs: Any) -> Any:
    (output,) = program.run(function, inputs, program.make_state(function)).values()
    return output


X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(F16)
CASES: dict[str, tuple[Callable[[Any], Any], Callable[[np.ndarray], np.ndarray]]] = {
    "softmax": (
        lambda x: mb.softmax(x=x, axis=-1),
        lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True),
    ),
    "rsqrt": (
        lambda x: mb.rsqrt(x=mb.mul(x=x, y=x), epsilon=F16(1e-3)),
        lambda x: 1 / np.sqrt((x * x).astype(F16) + np.float32(F16(1e-3))),  # each is rounded
    ),
    "transpose": (lambda x: mb.transpose(x=x, perm=[2, 0, 1]), lambda x: x.transpose(2, 0, 1)),
    "reshape": (
        lambda x: mb.reshape(x=x, shape=[2, -1]),
        lambda x: x.reshape(2, 24),
    ),
    "split and concat": (
        lambda x: mb.concat(values=list(mb.split(x=x, num_splits=2, axis=-1))[::-1], axis=-1),
        lambda x: np.concatenate([x[..., 4:], x[..., :4]], -1),
    ),
    "slice": (
        lambda x: mb.slice_by_index(x=x, begin=[0, 2, 0], end=[2, 3, 8]),
        lambda x: x[:, 2:3],
    ),
    "mean": (
        lambda x: mb.reduce_mean(x=x, axes=[-1], keep_dims=True),
        lambda x: x.mean(-1, keepdims=True),
    ),
    "gelu": (
        lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"),
        lambda x: 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3))),
    ),
    "matmul": (
        lambda x: mb.matmul(x=x, y=x, transpose_y=True),
        lambda x: x @ x.swapaxes(-1, -2),
    ),
    "tile": (lambda x: mb.tile(x=x, reps=[1, 2, 1]), lambda x: np.tile(x, (1, 2, 1))),
    "expand and squeeze": (
        lambda x: mb.squeeze(x=mb.expand_dims(x=x, axes=[0]), axes=[0]),
        lambda x: x,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_operations_compute_in_float32_and_round_to_float16(case: str, tmp_path: Path) -> None:
    build, expected = CASES[case]
    program = save(tmp_path / "m.mlpackage", main=([half(2, 3, 8)], lambda x: build(x)))
    actual = run(program, x=X)
    assert actual.dtype == F16
    assert np.array_equal(actual, expected(X.astype(np.float32)).astype(F16))


def test_every_finite_float16_is_converted_to_float32_exactly() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(F16)
    finite = every[np.isfinite(every)]
    assert np.array_equal(widen(finite).view(np.uint32), finite.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("asymmetric", [False, True])
def test_int4_weights_are_read_bit_for_bit(tmp_path: Path, asymmetric: bool) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(-8, 8, (16, 64)).astype(np.int8)
    scales = rng.uniform(0.01, 0.1, (16, 2)).astype(F16)
    offsets = rng.integers(-8, 8, (16, 2)).astype(np.int8)
    extra = {"offset": offsets.astype(types.np_int4_dtype)} if asymmetric else {}

    def body(x: Any) -> Any:
        weight = mb.constexpr_blockwise_shift_scale(
            data=codes.astype(types.np_int4_dtype), scale=scales, **extra
        )
        return mb.linear(x=x, weight=weight)

    program = save(tmp_path / "m.mlpackage", main=([half(1, 64)], body))
    shift = offsets.repeat(32, 1) if asymmetric else 0
    dense = ((codes - shift) * scales.astype(np.float32).repeat(32, 1)).astype(F16)
    actual = run(program, x=np.eye(64, dtype=F16)[:1])
    assert np.array_equal(actual[0], dense[:, 0])


def test_states_persist_between_calls_and_are_shared_by_functions(tmp_path: Path) -> None:
    state = mb.StateTensorSpec((4, 2), types.fp16)

    def add(x: Any, kept: Any) -> Any:
        total = mb.add(x=mb.read_state(input=kept), y=x)
        mb.coreml_update_state(state=kept, value=total)
        return total

    def read(x: Any, kept: Any) -> Any:
        return mb.add(x=mb.read_state(input=kept), y=x)

    program = save(
        tmp_path / "m.mlpackage", add=([half(4, 2), state], add), read=([half(4, 2), state], read)
    )
    kept = program.make_state("add")
    one, zero = np.ones((4, 2), F16), np.zeros((4, 2), F16)
    for _ in range(3):
        program.run("add", {"x": one}, kept)
    (total,) = program.run("read", {"x": zero}, kept).values()
    assert (total == 3).all()
    assert (run(program, "read", x=zero) == 0).all()  # a fresh state


def test_the_audit_names_the_operation_that_overflows(tmp_path: Path) -> None:
    def body(x: Any) -> Any:
        return mb.mul(x=mb.mul(x=x, y=F16(300), name="large"), y=F16(300), name="too_large")

    program = save(tmp_path / "m.mlpackage", main=([half(1, 4)], body))
    run(program, x=np.full((1, 4), 2, F16))
    assert program.audit.max_abs == 600
    assert program.audit.first_not_finite == "too_large"
    assert program.audit.largest(2) == [Peak("large", "mul", 600.0)]


def test_an_update_of_another_shape_is_refused() -> None:
    """Core ML checks no bounds: it writes past the end."""
    arguments = {
        "x": np.zeros((1, 4), F16),
        "update": np.array([[1, 2]], F16),
        "begin": np.array([0, 3]),
        "end": np.array([1, 5]),
    }
    with pytest.raises(Damaged, match=r"writes \(1, 2\) into a region of \(1, 1\)"):
        OPERATIONS["slice_update"](arguments)


def test_an_unknown_operation_and_function_fail_by_name(tmp_path: Path) -> None:
    program = save(tmp_path / "m.mlpackage", main=([half(1, 4)], lambda x: mb.atan(x=x)))
    with pytest.raises(SessionError, match="atan is not supported; supported are: abs"):
        run(program, x=np.zeros((1, 4), F16))
    with pytest.raises(SessionError, match="no function 'other'; it has: main"):
        program.inputs("other")


@pytest.mark.parametrize("given", [None, np.zeros((1, 5), F16)])
def test_wrong_inputs_are_refused(tmp_path: Path, given: Any) -> None:
    program = save(tmp_path / "m.mlpackage", main=([half(1, 4)], lambda x: mb.tanh(x=x)))
    with pytest.raises(SessionError, match="input x is"):
        run(program, **({} if given is None else {"x": given}))


@pytest.mark.parametrize("path", ["../../other", "/etc/hosts", "a\\b"])
def test_a_package_that_refers_outside_its_folder_is_refused(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "m.mlpackage"
    folder.mkdir()
    manifest = {"rootModelIdentifier": "m", "itemInfoEntries": {"m": {"path": path}}}
    (folder / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SessionError, match="outside the package"):
        Program(folder)


@pytest.mark.parametrize("damage", ["manifest", "model", "weights"])
def test_a_damaged_package_gives_one_error_line(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "m.mlpackage"
    weight = np.zeros((64, 64), F16)
    save(folder, main=([half(1, 64)], lambda x: mb.linear(x=x, weight=weight)))
    path = {
        "manifest": folder / "Manifest.json",
        "model": next(folder.rglob("*.mlmodel")),
        "weights": next(folder.rglob("weight.bin")),
    }[damage]
    path.write_bytes(path.read_bytes()[:70].replace(b"\xef\xbe\xad\xde", b"\0\0\0\0"))
    with pytest.raises(SessionError, match=r"not an \.mlpackage|can't be read|no record"):
        run(Program(folder), x=np.zeros((1, 64), F16))
