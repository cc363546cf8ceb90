"""Executes the functions of a package: operations in order, states between calls, an audit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from gemma_runtime.errors import SessionError
from gemma_runtime.mil.blob import Array
from gemma_runtime.mil.ops import MOVING, OPERATIONS, Result
from gemma_runtime.mil.package import Package, TensorType, Value, tensor_type

if TYPE_CHECKING:
    from coremltools.proto import MIL_pb2

State = dict[str, Array]


class _Name(str):
    """A value that an operation refers to, where a str is a constant of its own."""

    __slots__ = ()


Argument: TypeAlias = "_Name | Value | list[_Name | Value]"


@dataclass(slots=True)
class Audit:
    """What the calls so far reached, for the question whether float16 holds it."""

    max_abs: float = 0.0
    max_operation: str = ""
    first_not_finite: str | None = None  # the operation's name

    def note(self, operation: str, value: Array) -> None:
        if value.dtype.kind != "f" or value.size == 0:
            return
        largest = float(np.abs(value).max())
        if not np.isfinite(largest):
            self.first_not_finite = self.first_not_finite or operation
        elif largest > self.max_abs:
            self.max_abs, self.max_operation = largest, operation


@dataclass(frozen=True, slots=True)
class _Step:
    """An operation, ready to run: constants are read already."""

    name: str
    kind: str
    arguments: dict[str, Argument]
    outputs: tuple[tuple[str, TensorType], ...]
    last_uses: tuple[str, ...]  # values that no later operation needs


class Program:
    """A package's functions, over one set of constants."""

    def __init__(self, path: Path) -> None:
        self._package = Package(path)
        self._steps: dict[str, list[_Step]] = {}
        self._constants: dict[str, dict[str, Value]] = {}
        self._decoded: dict[tuple[object, ...], Array] = {}
        self.audit = Audit()

    @property
    def functions(self) -> tuple[str, ...]:
        return tuple(self._package.functions)

    def inputs(self, function: str) -> dict[str, TensorType]:
        """Names, types and shapes of what a call takes, states not among them."""
        return {n: t for n, (t, is_state) in self._declared(function).items() if not is_state}

    def make_state(self, function: str) -> State:
        """Zeros for every state; functions of one model share it by name."""
        return {
            name: np.zeros(declared.shape, declared.dtype)
            for name, (declared, is_state) in self._declared(function).items()
            if is_state
        }

    def run(self, function: str, inputs: Mapping[str, Array], state: State) -> dict[str, Array]:
        """Call a function; `state` is changed in place.

        Raises SessionError for a wrong input, and by name for an operation that is not known or
        whose result is not what the program declares.
        """
        steps = self._prepared(function)
        values: dict[str, Value] = dict(self._constants[function])
        for name, declared in self.inputs(function).items():
            values[name] = _checked_input(name, declared, inputs)
        for step in steps:
            self._execute(step, values, state)
        block = _block(self._package.functions[function])
        return {name: np.asarray(values[name]) for name in block.outputs}

    def _execute(self, step: _Step, values: dict[str, Value], state: State) -> None:
        arguments = {key: _resolve(given, values) for key, given in step.arguments.items()}
        if step.kind == "write_state":
            state[str(step.arguments["input"])] = np.array(arguments["data"])
        elif step.kind == "read_state":
            values[step.outputs[0][0]] = state[str(step.arguments["input"])]
        else:
            with np.errstate(all="ignore"):  # the audit tells of what overflows
                self._keep(step, OPERATIONS[step.kind](arguments), values)
        for name in step.last_uses:
            values.pop(name, None)

    def _keep(self, step: _Step, result: Result, values: dict[str, Value]) -> None:
        """Round to the declared type, and check the declared shape."""
        found = result if isinstance(result, list) else [result]
        for (name, declared), value in zip(step.outputs, found, strict=True):
            if value.shape != declared.shape:
                raise SessionError(
                    f"{step.kind} {step.name} gives {value.shape}, the program says "
                    f"{declared.shape}"
                )
            rounded = value.astype(declared.dtype, copy=False)
            if step.kind not in MOVING:
                self.audit.note(step.name, rounded)
            values[name] = rounded

    def _declared(self, function: str) -> dict[str, tuple[TensorType, bool]]:
        if function not in self._package.functions:
            known = ", ".join(self._package.functions)
            raise SessionError(f"the model has no function {function!r}; there are: {known}")
        return {
            given.name: (tensor_type(given.type), given.type.WhichOneof("type") == "stateType")
            for given in self._package.functions[function].inputs
        }

    def _prepared(self, function: str) -> list[_Step]:
        """Constants read and decoded, once, and the last use of every other value found."""
        if function not in self._steps:
            self._declared(function)
            block = _block(self._package.functions[function])
            constants: dict[str, Value] = {}
            rest = []
            for operation in block.operations:
                if operation.type == "const":
                    value = self._package.value(operation.attributes["val"])
                    constants[operation.outputs[0].name] = value
                elif operation.type.startswith("constexpr_"):
                    constants[operation.outputs[0].name] = self._decode(operation, constants)
                else:
                    rest.append(operation)
            self._steps[function] = self._number(rest, constants, set(block.outputs))
            self._constants[function] = constants
        return self._steps[function]

    def _decode(self, operation: "MIL_pb2.Operation", constants: Mapping[str, Value]) -> Array:
        """A compressed weight in its declared type; the same bytes are decoded once."""
        _check_known(operation)
        declared = tensor_type(operation.outputs[0].type)
        arguments = {
            key: constants[argument.name]
            if argument.WhichOneof("binding") == "name"
            else self._package.value(argument.value)
            for key, (argument,) in ((k, a.arguments) for k, a in operation.inputs.items())
        }
        key = (operation.type, *sorted((k, _place(v)) for k, v in arguments.items()))
        if key not in self._decoded:
            result = np.asarray(OPERATIONS[operation.type](arguments))
            self._decoded[key] = result.astype(declared.dtype)
        return self._decoded[key]

    def _number(
        self,
        operations: "list[MIL_pb2.Operation]",
        constants: Mapping[str, Value],
        kept: set[str],
    ) -> list[_Step]:
        uses: dict[str, int] = {}
        for place, operation in enumerate(operations):
            uses |= {
                argument.name: place
                for given in operation.inputs.values()
                for argument in given.arguments
                if argument.name
            }
        dying: dict[int, list[str]] = {}
        for name, place in uses.items():
            if name not in kept and name not in constants:
                dying.setdefault(place, []).append(name)
        return [self._step(op, tuple(dying.get(i, ()))) for i, op in enumerate(operations)]

    def _step(self, operation: "MIL_pb2.Operation", last_uses: tuple[str, ...]) -> _Step:
        _check_known(operation)
        arguments: dict[str, Argument] = {}
        for key, given in operation.inputs.items():
            bound = [
                _Name(argument.name)
                if argument.WhichOneof("binding") == "name"
                else self._package.value(argument.value)
                for argument in given.arguments
            ]
            arguments[key] = bound if key == "values" else bound[0]
        outputs = tuple((out.name, tensor_type(out.type)) for out in operation.outputs)
        name = outputs[0][0] if outputs else operation.type
        return _Step(name, operation.type, arguments, outputs, last_uses)


_STATEFUL = ("read_state", "write_state")


def _check_known(operation: "MIL_pb2.Operation") -> None:
    if operation.type not in OPERATIONS and operation.type not in _STATEFUL:
        raise SessionError(
            f"operation {operation.type} is not known here; there are: {', '.join(OPERATIONS)}"
        )


def _block(function: "MIL_pb2.Function") -> "MIL_pb2.Block":
    block: MIL_pb2.Block = function.block_specializations[function.opset]
    return block


def _resolve(given: Argument, values: Mapping[str, Value]) -> Value:
    if isinstance(given, _Name):
        return values.get(given, str(given))  # a state's name stands for itself
    if isinstance(given, list):
        return [_resolve(item, values) for item in given]
    return given


def _place(value: Value) -> object:
    """Where an array's bytes lie: constants of the weight file are views of one mapping."""
    if isinstance(value, np.ndarray):
        return value.__array_interface__["data"][0], value.shape
    return str(value)


def _checked_input(name: str, declared: TensorType, inputs: Mapping[str, Array]) -> Array:
    if name not in inputs:
        raise SessionError(f"input {name} is missing; the function takes {declared.shape}")
    if inputs[name].shape != declared.shape:
        raise SessionError(f"input {name} is {inputs[name].shape}, expected {declared.shape}")
    return inputs[name].astype(declared.dtype)
