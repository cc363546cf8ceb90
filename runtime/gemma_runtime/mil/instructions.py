"""Prepares a function for execution: reads its constants, checks names, finds last uses."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from gemma_runtime.errors import SessionError
from gemma_runtime.formats.protobuf import Damaged
from gemma_runtime.mil.arguments import Arguments, array
from gemma_runtime.mil.blob import Array, Nibbles
from gemma_runtime.mil.model import Binding, Function, NamedType, Operation, Reference
from gemma_runtime.mil.ops import KNOWN, MOVING, OPERATIONS
from gemma_runtime.mil.package import MilValue, Package
from gemma_runtime.mil.weights import Weight, open_block_weight, open_table_weight

ListItem: TypeAlias = "MilValue | Reference"

_LISTS = frozenset({"values"})  # arguments that are lists of tensors
_MOVING_MODES = ("update", "constant", "reflect", "replicate")  # modes that compute no new values


@dataclass(frozen=True, slots=True)
class Instruction:
    """An operation with its constants, ready to run."""

    name: str
    kind: str
    fixed: dict[str, MilValue]  # constant arguments
    bound: tuple[tuple[str, str], ...]  # (argument, name of its value)
    lists: tuple[tuple[str, tuple[ListItem, ...]], ...]  # (argument, its items)
    state: str  # name of the state that is read or written, or ""
    outputs: tuple[NamedType, ...]
    is_audited: bool
    last_uses: tuple[str, ...]  # values that no later instruction needs

    def arguments(self, values: Mapping[str, MilValue]) -> Arguments:
        arguments = dict(self.fixed)
        for key, name in self.bound:
            arguments[key] = values[name]
        for key, items in self.lists:
            arguments[key] = [values[i.name] if isinstance(i, Reference) else i for i in items]
        return arguments


def prepare(
    package: Package, function: Function, decoded: dict[tuple[object, ...], Array | Weight]
) -> tuple[list[Instruction], dict[str, MilValue]]:
    """The instructions of a function, and its constants by name.

    `decoded` caches weights that several functions share. Raises SessionError, naming the
    operation, if one can't be run.
    """
    constants: dict[str, MilValue] = {}
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
        return _instructions(package, rest, constants, function), constants
    except (Damaged, KeyError) as error:
        raise SessionError(f"the program is damaged: {error}; export the model again") from error


def _check_known(operation: Operation) -> None:
    if operation.kind != "const" and operation.kind not in KNOWN:
        raise SessionError(
            f"operation {operation.kind} is not supported; supported are: {', '.join(KNOWN)}"
        )
    if not operation.outputs and operation.kind != "write_state":
        raise Damaged(f"operation {operation.kind} has no output")


def _check_names(
    operations: Iterable[Operation], constants: Mapping[str, MilValue], function: Function
) -> None:
    """Check that every name is defined before its use, and is a state where one is needed."""
    states = {name for name, tensor in function.inputs.items() if tensor.is_state}
    known = {*constants, *function.inputs} - states
    for operation in operations:
        for key, name in _references(operation):
            is_state = key == "input" and operation.kind in ("read_state", "write_state")
            if name not in (states if is_state else known):
                used = f"{operation.kind} {operation.name} uses {name!r}"
                raise Damaged(f"{used}, which no operation produces")
        if operation.kind == "read_state":
            _check_state(operation, function)
        known |= {output.name for output in operation.outputs}
    if missing := [name for name in function.outputs if name not in known]:
        raise Damaged(f"no operation produces the output {missing[0]!r}")


def _check_state(operation: Operation, function: Function) -> None:
    binding = _only(operation, "input")
    if not isinstance(binding, Reference):
        raise Damaged(f"read_state {operation.name} reads a constant, expected a state")
    declared, read = function.inputs[binding.name].type, operation.outputs[0].type
    if declared != read:
        raise Damaged(f"state {binding.name} is {declared.shape}, but is read as {read.shape}")


def _only(operation: Operation, key: str) -> Binding:
    """The one value of an input. A damaged file may hold several, or none."""
    bindings = operation.inputs[key]
    if len(bindings) != 1:
        raise Damaged(f"input {key!r} of {operation.name} has {len(bindings)} values, expected 1")
    return bindings[0]


def _references(operation: Operation) -> Iterator[tuple[str, str]]:
    for key, bindings in operation.inputs.items():
        for binding in bindings:
            if isinstance(binding, Reference):
                yield key, binding.name


def _decode(
    package: Package,
    operation: Operation,
    constants: Mapping[str, MilValue],
    decoded: dict[tuple[object, ...], Array | Weight],
) -> Array | Weight:
    """A compressed weight, opened once for the same bytes."""
    arguments = {
        key: _constant(package, _only(operation, key), constants) for key in operation.inputs
    }
    key = (operation.kind, *sorted((k, str(_address(v))) for k, v in arguments.items()))
    if key not in decoded:
        decoded[key] = _open_weight(operation, arguments)
    if decoded[key].shape != operation.outputs[0].type.shape:
        raise Damaged(
            f"{operation.name} is {decoded[key].shape}, the program declares "
            f"{operation.outputs[0].type.shape}"
        )
    return decoded[key]


def _open_weight(operation: Operation, arguments: Arguments) -> Array | Weight:
    """Keep a matrix compressed; dequantize any other shape."""
    dtype = operation.outputs[0].type.dtype
    is_block = operation.kind == "constexpr_blockwise_shift_scale"
    codes = arguments["data" if is_block else "indices"]
    if not isinstance(codes, Nibbles | np.ndarray) or len(codes.shape) != 2:
        return np.asarray(OPERATIONS[operation.kind](arguments)).astype(dtype)
    if is_block:
        offset = array(arguments, "offset") if "offset" in arguments else None
        return open_block_weight(codes, array(arguments, "scale"), offset, dtype)
    return open_table_weight(codes, array(arguments, "lut"), dtype)


def _constant(package: Package, binding: Binding, constants: Mapping[str, MilValue]) -> MilValue:
    return constants[binding.name] if isinstance(binding, Reference) else package.value(binding)


def _address(value: MilValue) -> object:
    """The address, shape and type of a constant, equal for equal views of the weight file."""
    if isinstance(value, Nibbles):
        return value.packed.__array_interface__["data"][0], value.shape, value.signed
    if isinstance(value, np.ndarray):
        return value.__array_interface__["data"][0], value.shape, value.dtype
    return value


def _instructions(
    package: Package,
    operations: Sequence[Operation],
    constants: Mapping[str, MilValue],
    function: Function,
) -> list[Instruction]:
    last: dict[str, int] = {}
    for index, operation in enumerate(operations):
        last |= {output.name: index for output in operation.outputs}  # in case it is never used
        last |= {name: index for _, name in _references(operation)}
    states = {name for name, tensor in function.inputs.items() if tensor.is_state}
    last_uses: dict[int, list[str]] = {}
    for name in last.keys() - {*function.outputs, *constants, *states}:
        last_uses.setdefault(last[name], []).append(name)
    return [
        _instruction(package, operation, constants, tuple(last_uses.get(index, ())))
        for index, operation in enumerate(operations)
    ]


def _instruction(
    package: Package,
    operation: Operation,
    constants: Mapping[str, MilValue],
    last_uses: tuple[str, ...],
) -> Instruction:
    fixed: dict[str, MilValue] = {}
    bound: list[tuple[str, str]] = []
    lists: list[tuple[str, tuple[ListItem, ...]]] = []
    state = ""
    for key, bindings in operation.inputs.items():
        items = tuple(b if isinstance(b, Reference) else package.value(b) for b in bindings)
        if key in _LISTS:
            lists.append((key, items))
        elif len(items) != 1:
            named = f"{operation.kind} {operation.name}"
            raise Damaged(f"{named} has {len(items)} values for {key}, expected one")
        elif not isinstance(items[0], Reference):
            fixed[key] = items[0]
        elif key == "input" and operation.kind in ("read_state", "write_state"):
            state = items[0].name
        elif items[0].name in constants:
            fixed[key] = constants[items[0].name]
        else:
            bound.append((key, items[0].name))
    is_audited = operation.kind not in MOVING or fixed.get("mode", "update") not in _MOVING_MODES
    return Instruction(
        operation.name,
        operation.kind,
        fixed,
        tuple(bound),
        tuple(lists),
        state,
        operation.outputs,
        is_audited,
        last_uses,
    )
