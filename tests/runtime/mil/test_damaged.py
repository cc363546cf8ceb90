"""Broken and malicious packages: each gives one error line, no crash, no unbounded memory."""

import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_runtime.errors import SessionError
from gemma_runtime.mil.interpreter import Program
from gemma_runtime.quiet import quiet
from tests.runtime.mil.test_interpreter import F16, half, save

with quiet():
    pytest.importorskip("coremltools")
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    Model_pb2 = pytest.importorskip("coremltools.proto.Model_pb2")

CODES = np.random.default_rng(0).integers(-8, 8, (64, 64)).astype(np.int8)


def build(folder: Path) -> Path:
    """Save a small program with what the exported ones contain: int4, a state, a table."""
    state = mb.StateTensorSpec((4, 64), types.fp16)

    def body(x: Any, kept: Any) -> Any:
        weight = mb.constexpr_blockwise_shift_scale(
            data=CODES.astype(types.np_int4_dtype), scale=np.full((64, 2), 0.1, F16)
        )
        old = mb.read_state(input=kept)
        y = mb.linear(x=mb.gelu(x=x, mode="TANH_APPROXIMATION"), weight=weight)
        rows = mb.gather(x=np.ones((128, 64), F16), indices=np.array([1, 5]), axis=0)
        z = mb.softmax(x=mb.tile(x=mb.add(x=y, y=rows), reps=[2, 1]), axis=-1)
        mb.coreml_update_state(state=kept, value=mb.add(x=old, y=z))
        return mb.transpose(x=mb.reshape(x=z, shape=[2, 2, 64]), perm=[1, 0, 2])

    save(folder, main=([half(1, 64), state], body))
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("damaged") / "m.mlpackage")


def model_of(package: Path) -> Path:
    return next(package.rglob("*.mlmodel"))


def weights_of(package: Path) -> Path:
    return next(package.rglob("weight.bin"))


def call(package: Path) -> None:
    """Run the program; a damaged one may have no outputs."""
    program = Program(package)
    program.run("main", {"x": np.ones((1, 64), F16)}, program.make_state("main"))


@cache
def contents(path: Path) -> bytes:
    return path.read_bytes()


def test_an_output_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    """A name with the top bit of its first letter flipped ended in a traceback."""
    damaged = build(tmp_path / "m.mlpackage")
    name = Program(damaged)._package.functions["main"].outputs[0].encode()
    intact = model_of(damaged).read_bytes()
    model_of(damaged).write_bytes(intact.replace(name, bytes([name[0] | 0x80]) + name[1:]))
    with pytest.raises(SessionError, match="is not a UTF-8 string"):
        Program(damaged)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_flipped_bits_give_an_error_line_or_a_result(package: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from([model_of(package), weights_of(package)]))
    intact = contents(path)
    damaged = bytearray(intact)
    for offset in data.draw(st.lists(st.integers(0, len(intact) - 1), min_size=1, max_size=4)):
        damaged[offset] ^= 1 << data.draw(st.integers(0, 7))
    check_damaged(package, path, intact, bytes(damaged))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_truncated_files_give_an_error_line_or_a_result(package: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from([model_of(package), weights_of(package)]))
    intact = contents(path)
    check_damaged(package, path, intact, intact[: data.draw(st.integers(0, len(intact) - 1))])


def check_damaged(package: Path, path: Path, intact: bytes, damaged: bytes) -> None:
    path.write_bytes(damaged)
    tracemalloc.start()
    try:
        call(package)
    except SessionError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        path.write_bytes(intact)
    assert peak < 1 << 28


def edited(package: Path, edit: Callable[[Any], None], folder: Path) -> Path:
    """Copy the package to `folder`, with its model changed by `edit`."""
    model = Model_pb2.Model()
    model.ParseFromString(contents(model_of(package)))
    (function,) = model.mlProgram.functions.values()
    edit(function)
    for path in package.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    model_of(folder).write_bytes(model.SerializeToString())
    return folder


def operations(function: Any) -> Any:
    return function.block_specializations[function.opset].operations


def blob(function: Any) -> Any:
    """The first constant that is stored in the weight file."""
    for operation in operations(function):
        for value in operation.attributes.values():
            if value.WhichOneof("value") == "blobFileValue":
                return value
        for argument in operation.inputs.values():
            for binding in argument.arguments:
                if binding.value.WhichOneof("value") == "blobFileValue":
                    return binding.value
    raise AssertionError


def set_offset(function: Any, offset: int) -> None:
    blob(function).blobFileValue.offset = offset


def set_file(function: Any, name: str) -> None:
    blob(function).blobFileValue.fileName = name


def set_size(tensor: Any) -> None:
    for dimension in tensor.dimensions:
        dimension.constant.size = 10**6


def enlarge_output(function: Any) -> None:
    set_size(operations(function)[-1].outputs[0].type.tensorType)


def enlarge_weight(function: Any) -> None:
    set_size(blob(function).type.tensorType)


def rename_argument(function: Any) -> None:
    operation = next(o for o in operations(function) if o.type == "softmax")
    operation.inputs["x"].arguments[0].name = "nothing"


def double_weight_input(function: Any) -> None:
    operation = next(o for o in operations(function) if o.type.startswith("constexpr_"))
    operation.inputs["data"].arguments.append(operation.inputs["data"].arguments[0])


CHANGES: list[tuple[str, Callable[[Any], None], str]] = [
    ("offset", lambda f: set_offset(f, 65), "no record at byte 65"),
    ("far offset", lambda f: set_offset(f, 10**15), "no record at byte 1000000000000000"),
    ("file", lambda f: set_file(f, "@model_path/weights/none.bin"), "can't be read"),
    ("outside", lambda f: set_file(f, "@model_path/../../../other.bin"), "outside the package"),
    ("link", lambda f: set_file(f, "@model_path/link.bin"), "outside the package"),
    ("output", enlarge_output, "more than 1073741824 elements"),
    ("weight", enlarge_weight, "the model expects|more than 1073741824 elements"),
    ("two values", double_weight_input, "input 'data' of .* has 2 values, expected 1"),
    ("name", rename_argument, "uses 'nothing', which no operation produces"),
]


@pytest.mark.parametrize(("name", "edit", "message"), CHANGES, ids=[c[0] for c in CHANGES])
def test_the_error_names_what_is_wrong_with_a_package(
    package: Path, tmp_path: Path, name: str, edit: Callable[[Any], None], message: str
) -> None:
    changed = edited(package, edit, tmp_path / "m.mlpackage")
    (tmp_path / "secret").write_bytes(bytes(100))
    (model_of(changed).parent / "link.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(SessionError, match=message):
        call(changed)


def test_functions_that_declare_a_state_differently_are_refused(tmp_path: Path) -> None:
    def read(x: Any, kept: Any) -> Any:
        return mb.add(x=mb.read_state(input=kept), y=x)

    def specs(rows: int) -> list[Any]:
        return [half(rows, 2), mb.StateTensorSpec((rows, 2), types.fp16)]

    with pytest.raises(
        SessionError, match=r"state kept is float16.4, 2. in a and float16.5, 2. in b"
    ):
        save(tmp_path / "m.mlpackage", a=(specs(4), read), b=(specs(5), read))


def test_a_missing_state_is_refused(package: Path) -> None:
    program = Program(package)
    with pytest.raises(SessionError, match="state kept is missing"):
        program.run("main", {"x": np.ones((1, 64), F16)}, {})
