"""Turns a function's operations into steps: constants read, names checked, last uses found."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from gemma_runtime.errors import SessionError
from gemma_runtime.mil.arguments import Arguments, array
from gemma_runtime.mil.blob import Array, Nibbles
from gemma_runtime.mil.model import Binding, Function, Name, NamedType, Operation
from gemma_runtime.mil.ops import KNOWN, MOVING, OPERATIONS
from gemma_runtime.mil.package import Package, Value
from gemma_runtime.mil.weights import Weight, open_block_weight, open_table_weight
from gemma_runtime.mil.wire import Damaged

Item: TypeAlias = "Value | Name"

_LISTS = frozenset({"values"})  # arguments that are several values
_MOVES = ("update", "constant", "reflect", "replicate")  # modes that compute nothing


@dataclass(frozen=True, slots=True)
class Step:
    """An operation, ready to run."""

    name: str
    kind: str
    fixed: dict[str, Value]  # arguments that are the same in every call
    bound: tuple[tuple[str, str], ...]  # argument, the name of its value
    lists: tuple[tuple[str, tuple[Item, ...]], ...]
    state: str
    outputs: tuple[NamedType, ...]
    is_audited: bool
    last_uses: tuple[str, ...]  # values that no later operation needs

    def arguments(self, values: Mapping[str, Value]) -> Arguments:
        found = dict(self.fixed)
        for key, name in self.bound:
            found[key] = values[name]
        for key, items in self.lists:
            found[key] = [values[i.text] if isinstance(i, Name) else i for i in items]
        return found


def prepare(
    package: Package, function: Function, decoded: dict[tuple[object, ...], Array | Weight]
) -> tuple[list[Step], dict[str, Value]]:
    """Steps and constants. `decoded` keeps weights that several functions share.

    Raises SessionError by name for what can't be run.
    """
    constants: dict[str, Value] = {}
    rest: list[Operation] = []
    try:
        for operation in function.operations():
            _check_known(operation)
            if operation.kind == "const":
                constants[operation.name] = package.value(operation.attributes["val"])
            elif operation.kind.startswith("constexpr_"):
                constants[operation.name] = _decode(package, operation, constants, decoded)
            else:
                rest.append(operation)
        _check_names(rest, constants, function)
        return _steps(package, rest, constants, function), constants
    except (Damaged, KeyError) as error:
        raise SessionError(f"the program is damaged: {error}; export the model again") from error


def _check_known(operation: Operation) -> None:
    if operation.kind != "const" and operation.kind not in KNOWN:
        raise SessionError(
            f"operation {operation.kind} is not known here; there are: {', '.join(KNOWN)}"
        )
    if not operation.outputs and operation.kind != "write_state":
        raise Damaged(f"a {operation.kind} without a result")


def _check_names(
    operations: Iterable[Operation], constants: Mapping[str, Value], function: Function
) -> None:
    """Every name is given before it is used, and stands for what it is used for."""
    states = {name for name, given in function.inputs.items() if given.is_state}
    known = {*constants, *function.inputs} - states
    for operation in operations:
        for key, name in _names(operation):
            is_state = key == "input" and operation.kind in ("read_state", "write_state")
            if name not in (states if is_state else known):
                raise Damaged(f"{operation.kind} {operation.name} takes {name!r}, which nothing is")
        if operation.kind == "read_state":
            _check_state(operation, function)
        known |= {output.name for output in operation.outputs}
    if missing := [name for name in function.outputs if name not in known]:
        raise Damaged(f"nothing gives the output {missing[0]!r}")


def _check_state(operation: Operation, function: Function) -> None:
    (binding,) = operation.inputs["input"]
    if not isinstance(binding, Name):
        raise Damaged(f"read_state {operation.name} names no state")
    declared, read = function.inputs[binding.text].type, operation.outputs[0].type
    if declared != read:
        raise Damaged(f"state {binding.text} is {declared.shape}, and is read as {read.shape}")


def _names(operation: Operation) -> Iterator[tuple[str, str]]:
    for key, bindings in operation.inputs.items():
        for binding in bindings:
            if isinstance(binding, Name):
                yield key, binding.text


def _decode(
    package: Package,
    operation: Operation,
    constants: Mapping[str, Value],
    decoded: dict[tuple[object, ...], Array | Weight],
) -> Array | Weight:
    """A compressed weight; the same bytes are opened once."""
    arguments = {
        key: _constant(package, binding, constants) for key, (binding,) in operation.inputs.items()
    }
    key = (operation.kind, *sorted((k, str(_place(v))) for k, v in arguments.items()))
    if key not in decoded:
        decoded[key] = _open_weight(operation, arguments)
    if decoded[key].shape != operation.outputs[0].type.shape:
        raise Damaged(
            f"{operation.name} is {decoded[key].shape}, the program says "
            f"{operation.outputs[0].type.shape}"
        )
    return decoded[key]


def _open_weight(operation: Operation, arguments: Arguments) -> Array | Weight:
    """A matrix stays compressed; anything else is decoded."""
    dtype = operation.outputs[0].type.dtype
    is_block = operation.kind == "constexpr_blockwise_shift_scale"
    codes = arguments["data" if is_block else "indices"]
    if not isinstance(codes, Nibbles | np.ndarray) or len(codes.shape) != 2:
        return np.asarray(OPERATIONS[operation.kind](arguments)).astype(dtype)
    if is_block:
        offset = array(arguments, "offset") if "offset" in arguments else None
        return open_block_weight(codes, array(arguments, "scale"), offset, dtype)
    return open_table_weight(codes, array(arguments, "lut"), dtype)


def _constant(package: Package, binding: Binding, constants: Mapping[str, Value]) -> Value:
    return constants[binding.text] if isinstance(binding, Name) else package.value(binding)


def _place(value: Value) -> object:
    """Where a constant's bytes lie: those of the weight file are views of one mapping."""
    if isinstance(value, Nibbles):
        return value.packed.__array_interface__["data"][0], value.shape, value.signed
    if isinstance(value, np.ndarray):
        return value.__array_interface__["data"][0], value.shape, value.dtype
    return value


def _steps(
    package: Package,
    operations: Sequence[Operation],
    constants: Mapping[str, Value],
    function: Function,
) -> list[Step]:
    last: dict[str, int] = {}
    for place, operation in enumerate(operations):
        last |= {output.name: place for output in operation.outputs}  # some are never used
        last |= {name: place for _, name in _names(operation)}
    states = {name for name, given in function.inputs.items() if given.is_state}
    dying: dict[int, list[str]] = {}
    for name in last.keys() - {*function.outputs, *constants, *states}:
        dying.setdefault(last[name], []).append(name)
    return [
        _step(package, operation, constants, tuple(dying.get(place, ())))
        for place, operation in enumerate(operations)
    ]


def _step(
    package: Package,
    operation: Operation,
    constants: Mapping[str, Value],
    last_uses: tuple[str, ...],
) -> Step:
    fixed: dict[str, Value] = {}
    bound: list[tuple[str, str]] = []
    lists: list[tuple[str, tuple[Item, ...]]] = []
    state = ""
    for key, bindings in operation.inputs.items():
        items = tuple(b if isinstance(b, Name) else package.value(b) for b in bindings)
        if key in _LISTS:
            lists.append((key, items))
        elif len(items) != 1:
            raise Damaged(f"{operation.kind} {operation.name} takes {len(items)} values as {key}")
        elif not isinstance(items[0], Name):
            fixed[key] = items[0]
        elif key == "input" and operation.kind in ("read_state", "write_state"):
            state = items[0].text
        elif items[0].text in constants:
            fixed[key] = constants[items[0].text]
        else:
            bound.append((key, items[0].text))
    audited = operation.kind not in MOVING or fixed.get("mode", "update") not in _MOVES
    return Step(
        operation.name,
        operation.kind,
        fixed,
        tuple(bound),
        tuple(lists),
        state,
        operation.outputs,
        audited,
        last_uses,
    )
