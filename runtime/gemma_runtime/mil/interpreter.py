"""Executes a package's functions: runs operations in order, keeps states, audits values."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gemma_runtime.errors import SessionError
from gemma_runtime.machine import physical_cores
from gemma_runtime.mil.arguments import Arguments, Result, as_array, floats, weight
from gemma_runtime.mil.audit import Audit
from gemma_runtime.mil.blob import Array
from gemma_runtime.mil.instructions import Instruction, prepare
from gemma_runtime.mil.model import Function, NamedType, TensorType
from gemma_runtime.mil.ops import OPERATIONS
from gemma_runtime.mil.package import MilValue, Package
from gemma_runtime.mil.weights import Weight, multiply

State = dict[str, Array]

# What numpy raises for unsuitable arguments. The program is at fault, not this interpreter.
_WRONG_ARGUMENTS = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    AttributeError,
)


class Program:
    """A package's functions, which share one set of constants."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """`threads=None` uses one thread per physical core. Raises SessionError if damaged."""
        self._package = Package(path)
        self._thread_count = threads or physical_cores()
        self._pool = ThreadPoolExecutor(self._thread_count)
        self._instructions: dict[str, tuple[list[Instruction], dict[str, MilValue]]] = {}
        self._decoded: dict[tuple[object, ...], Array | Weight] = {}
        self.audit = Audit()
        _check_states(self._package.functions)

    @property
    def functions(self) -> tuple[str, ...]:
        return tuple(self._package.functions)

    def inputs(self, function: str) -> dict[str, TensorType]:
        """Type and shape of each input by name, without the states."""
        declared = self._function(function).inputs.values()
        return {tensor.name: tensor.type for tensor in declared if not tensor.is_state}

    def make_state(self, function: str) -> State:
        """Zeros for every state by name. All functions of the model can use the same states."""
        return {
            tensor.name: np.zeros(tensor.type.shape, tensor.type.dtype)
            for tensor in self._function(function).inputs.values()
            if tensor.is_state
        }

    def prepare(self, function: str) -> None:
        """Read a function and its constants now; otherwise its first call does.

        Raises SessionError, naming the operation, if an operation is not supported or can't be run.
        """
        if function not in self._instructions:
            self._instructions[function] = prepare(
                self._package, self._function(function), self._decoded
            )

    def run(self, function: str, inputs: Mapping[str, Array], state: State) -> dict[str, Array]:
        """Call a function and return its outputs by name; update `state` in place.

        Raises SessionError for a wrong input or state, and for an operation whose result doesn't
        have the declared shape.
        """
        self.prepare(function)
        instructions, constants = self._instructions[function]
        values: dict[str, MilValue] = dict(constants)
        declared = self._function(function)
        for tensor in declared.inputs.values():
            if tensor.is_state:
                _checked("state", tensor, state)
            else:
                values[tensor.name] = _checked("input", tensor, inputs).astype(tensor.type.dtype)
        with np.errstate(all="ignore"):  # the audit reports overflows
            for instruction in instructions:
                self._execute(instruction, values, state)
        return {name: as_array(values[name]) for name in declared.outputs}

    def close(self) -> None:
        self._pool.shutdown()

    def _execute(self, instruction: Instruction, values: dict[str, MilValue], state: State) -> None:
        try:
            if instruction.kind == "write_state":
                state[instruction.state] = np.array(instruction.arguments(values)["data"])
            elif instruction.kind == "read_state":
                values[instruction.name] = state[instruction.state]
            elif instruction.kind == "linear":
                self._keep(instruction, self._linear(instruction.arguments(values)), values)
            else:
                self._keep(
                    instruction, OPERATIONS[instruction.kind](instruction.arguments(values)), values
                )
        except _WRONG_ARGUMENTS as error:
            raise SessionError(
                f"{instruction.kind} {instruction.name}: {error or 'no memory'}"
            ) from error
        for name in instruction.last_uses:
            del values[name]

    def _linear(self, arguments: Arguments) -> Array:
        x, matrix = floats(arguments, "x"), weight(arguments, "weight")
        y = multiply(x, matrix, self._pool, self._thread_count)
        return y + floats(arguments, "bias") if "bias" in arguments else y

    def _keep(self, instruction: Instruction, result: Result, values: dict[str, MilValue]) -> None:
        """Check each result's shape, convert it to the declared type, audit and store it."""
        results = result if isinstance(result, list) else [result]
        for output, value in zip(instruction.outputs, results, strict=True):
            if value.shape != output.type.shape:
                raise ValueError(f"gives {value.shape}, the program declares {output.type.shape}")
            rounded = value.astype(output.type.dtype, copy=False)
            if instruction.is_audited:
                self.audit.record(output.name, instruction.kind, rounded)
            values[output.name] = rounded

    def _function(self, name: str) -> Function:
        if name not in self._package.functions:
            known = ", ".join(self._package.functions)
            raise SessionError(f"the model has no function {name!r}; it has: {known}")
        return self._package.functions[name]


def _check_states(functions: Mapping[str, Function]) -> None:
    """Functions share a state by name, so all must declare the same type and shape for it."""
    seen: dict[str, tuple[str, TensorType]] = {}
    for function, state in _states(functions):
        first, declared = seen.setdefault(state.name, (function, state.type))
        if declared != state.type:
            raise SessionError(
                f"state {state.name} is {declared.dtype}{list(declared.shape)} in {first} and "
                f"{state.type.dtype}{list(state.type.shape)} in {function}; export the model again"
            )


def _states(functions: Mapping[str, Function]) -> Iterable[tuple[str, NamedType]]:
    for name, function in sorted(functions.items()):
        yield from ((name, tensor) for tensor in function.inputs.values() if tensor.is_state)


def _checked(role: str, declared: NamedType, tensors: Mapping[str, Array]) -> Array:
    name, expected = declared.name, declared.type.shape
    if name not in tensors:
        raise SessionError(f"{role} {name} is missing; the function expects {expected}")
    if tensors[name].shape != expected:
        raise SessionError(f"{role} {name} is {tensors[name].shape}, expected {expected}")
    return tensors[name]
