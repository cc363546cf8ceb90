"""Executes the functions of a package: operations in order, states between calls, an audit."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gemma_runtime.errors import SessionError
from gemma_runtime.machine import physical_cores
from gemma_runtime.mil.arguments import Arguments, Result, as_array, floats, weight
from gemma_runtime.mil.audit import Audit
from gemma_runtime.mil.blob import Array
from gemma_runtime.mil.model import Function, NamedType, TensorType
from gemma_runtime.mil.ops import OPERATIONS
from gemma_runtime.mil.package import Package, Value
from gemma_runtime.mil.steps import Step, prepare
from gemma_runtime.mil.weights import Weight, multiply

State = dict[str, Array]

# What numpy raises for arguments that don't fit; the program is at fault, not we.
_WRONG_ARGUMENTS = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    AttributeError,
)


class Program:
    """A package's functions, over one set of constants."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """`threads=None` takes the physical cores. Raises SessionError for a damaged package."""
        self._package = Package(path)
        self._count = threads or physical_cores()
        self._threads = ThreadPoolExecutor(self._count)
        self._steps: dict[str, tuple[list[Step], dict[str, Value]]] = {}
        self._decoded: dict[tuple[object, ...], Array | Weight] = {}
        self.audit = Audit()
        _check_states(self._package.functions)

    @property
    def functions(self) -> tuple[str, ...]:
        return tuple(self._package.functions)

    def inputs(self, function: str) -> dict[str, TensorType]:
        """Names, types and shapes of what a call takes, states not among them."""
        found = self._function(function).inputs.values()
        return {given.name: given.type for given in found if not given.is_state}

    def make_state(self, function: str) -> State:
        """Zeros for every state; functions of one model share it by name."""
        return {
            given.name: np.zeros(given.type.shape, given.type.dtype)
            for given in self._function(function).inputs.values()
            if given.is_state
        }

    def prepare(self, function: str) -> None:
        """Read a function and its constants, which its first call does otherwise.

        Raises SessionError by name for an operation that is not known, and for whatever in the
        function can't be run.
        """
        if function not in self._steps:
            self._steps[function] = prepare(self._package, self._function(function), self._decoded)

    def run(self, function: str, inputs: Mapping[str, Array], state: State) -> dict[str, Array]:
        """Call a function; `state` is changed in place.

        Raises SessionError for a wrong input or state, and by name for an operation whose result
        is not what the program declares.
        """
        self.prepare(function)
        steps, constants = self._steps[function]
        values: dict[str, Value] = dict(constants)
        declared = self._function(function)
        for given in declared.inputs.values():
            if given.is_state:
                _checked("state", given, state)
            else:
                values[given.name] = _checked("input", given, inputs).astype(given.type.dtype)
        with np.errstate(all="ignore"):  # the audit tells of what overflows
            for step in steps:
                self._execute(step, values, state)
        return {name: as_array(values[name]) for name in declared.outputs}

    def close(self) -> None:
        self._threads.shutdown()

    def _execute(self, step: Step, values: dict[str, Value], state: State) -> None:
        try:
            if step.kind == "write_state":
                state[step.state] = np.array(step.arguments(values)["data"])
            elif step.kind == "read_state":
                values[step.name] = state[step.state]
            elif step.kind == "linear":
                self._keep(step, self._linear(step.arguments(values)), values)
            else:
                self._keep(step, OPERATIONS[step.kind](step.arguments(values)), values)
        except _WRONG_ARGUMENTS as error:
            raise SessionError(f"{step.kind} {step.name}: {error or 'no memory'}") from error
        for name in step.last_uses:
            del values[name]

    def _linear(self, arguments: Arguments) -> Array:
        x, matrix = floats(arguments, "x"), weight(arguments, "weight")
        y = multiply(x, matrix, self._threads, self._count)
        return y + floats(arguments, "bias") if "bias" in arguments else y

    def _keep(self, step: Step, result: Result, values: dict[str, Value]) -> None:
        """Round to the declared type, and check the declared shape."""
        found = result if isinstance(result, list) else [result]
        for output, value in zip(step.outputs, found, strict=True):
            if value.shape != output.type.shape:
                raise ValueError(f"gives {value.shape}, the program says {output.type.shape}")
            rounded = value.astype(output.type.dtype, copy=False)
            if step.is_audited:
                self.audit.note(output.name, step.kind, rounded)
            values[output.name] = rounded

    def _function(self, name: str) -> Function:
        if name not in self._package.functions:
            known = ", ".join(self._package.functions)
            raise SessionError(f"the model has no function {name!r}; there are: {known}")
        return self._package.functions[name]


def _check_states(functions: Mapping[str, Function]) -> None:
    """Functions share a state by its name, so they must mean the same by it."""
    seen: dict[str, tuple[str, TensorType]] = {}
    for function, given in _states(functions):
        first, declared = seen.setdefault(given.name, (function, given.type))
        if declared != given.type:
            raise SessionError(
                f"state {given.name} is {declared.dtype}{list(declared.shape)} in {first} and "
                f"{given.type.dtype}{list(given.type.shape)} in {function}; export the model again"
            )


def _states(functions: Mapping[str, Function]) -> Iterable[tuple[str, NamedType]]:
    for name, function in sorted(functions.items()):
        yield from ((name, given) for given in function.inputs.values() if given.is_state)


def _checked(what: str, declared: NamedType, given: Mapping[str, Array]) -> Array:
    name, expected = declared.name, declared.type.shape
    if name not in given:
        raise SessionError(f"{what} {name} is missing; the function takes {expected}")
    if given[name].shape != expected:
        raise SessionError(f"{what} {name} is {given[name].shape}, expected {expected}")
    return given[name]
