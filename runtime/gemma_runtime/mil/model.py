"""A Core ML model file as frozen data: functions, operations, types and constants.

Field numbers are those of coremltools' `Model.proto` and `MIL.proto`.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from gemma_runtime.mil.wire import Damaged, Message

# MIL's DataType numbers. Narrow integers are held in bytes.
DTYPES: dict[int, np.dtype[np.generic]] = {
    1: np.dtype(np.bool_),
    10: np.dtype(np.float16),
    11: np.dtype(np.float32),
    21: np.dtype(np.int8),
    22: np.dtype(np.int16),
    23: np.dtype(np.int32),
    24: np.dtype(np.int64),
    25: np.dtype(np.int8),  # int4
    31: np.dtype(np.uint8),
    32: np.dtype(np.uint16),
    33: np.dtype(np.uint32),
    35: np.dtype(np.uint8),  # uint4
}
_STRING = 2
MAX_ELEMENTS = 1 << 30  # of one tensor; Gemma 2 27b's largest cache at 8192 tokens has 2^29.6


@dataclass(frozen=True, slots=True)
class TensorType:
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Constant:
    """A value written in the model, or the place in a weight file that holds it."""

    type: TensorType | None  # None for texts and lists
    file: str | None
    offset: int
    immediate: bytes  # an ImmediateValue


@dataclass(frozen=True, slots=True)
class Name:
    """A value that another operation, an input or a state gives."""

    text: str


Binding: TypeAlias = Name | Constant


@dataclass(frozen=True, slots=True)
class NamedType:
    name: str
    type: TensorType
    is_state: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    kind: str
    name: str  # its first output's
    inputs: dict[str, tuple[Binding, ...]]
    outputs: tuple[NamedType, ...]
    attributes: dict[str, Constant]


class Function:
    """Inputs and outputs by name; the operations are read when they are asked for."""

    def __init__(self, data: bytes) -> None:
        function = Message(data)
        opset, blocks = function.text(2), function.mapping(3)
        if opset not in blocks:
            raise Damaged(f"no block of operations for {opset!r}")
        self.inputs = {n.name: n for n in map(_named, function.messages(1))}
        self._block = Message(blocks[opset])
        self.outputs = tuple(self._block.texts(2))

    def operations(self) -> list[Operation]:
        return [_operation(operation) for operation in self._block.messages(3)]


def read_functions(data: bytes) -> dict[str, Function]:
    """The functions of an ML Program; none if the model is of another kind. Raises Damaged."""
    program = Message(data).message(502)
    return {name: Function(function) for name, function in program.mapping(2).items()}


def check_elements(what: str, shape: tuple[int, ...]) -> None:
    """Raises Damaged for a tensor that nobody means, before anything is set aside for it."""
    if math.prod(shape) > MAX_ELEMENTS:
        raise Damaged(f"{what} is declared {shape}, more than {MAX_ELEMENTS} elements")


def _operation(operation: Message) -> Operation:
    outputs = tuple(map(_named, operation.messages(3)))
    kind = operation.text(1)
    return Operation(
        kind,
        outputs[0].name if outputs else kind,
        {key: _bindings(Message(value)) for key, value in operation.mapping(2).items()},
        outputs,
        {key: _constant(Message(value)) for key, value in operation.mapping(5).items()},
    )


def _bindings(argument: Message) -> tuple[Binding, ...]:
    return tuple(
        _constant(binding.message(2)) if 2 in binding else Name(binding.text(1))
        for binding in argument.messages(1)
    )


def _constant(value: Message) -> Constant:
    declared, file = value.message(2), value.message(5)
    tensor = declared.message(1)
    is_tensor = 1 in declared and tensor.number(1) != _STRING
    return Constant(
        _tensor_type(tensor) if is_tensor else None,
        file.text(1) if 5 in value else None,
        file.number(2),
        value.data(3),
    )


def _named(named: Message) -> NamedType:
    """Name and type of a tensor, or of the tensor that a state wraps."""
    name, declared = named.text(1), named.message(2)
    if 5 in declared:
        wrapped = declared.message(5).message(1)
        return NamedType(name, _tensor_type(wrapped.message(1)), is_state=True)
    found = _tensor_type(declared.message(1))
    check_elements(name, found.shape)
    return NamedType(name, found)


def _tensor_type(tensor: Message) -> TensorType:
    kind = tensor.number(1)
    dimensions = list(tensor.messages(3))
    if any(2 in dimension for dimension in dimensions):
        raise Damaged("a flexible shape; only fixed ones run here")
    shape = tuple(dimension.message(1).number(1) for dimension in dimensions)
    return TensorType(DTYPES.get(kind, np.dtype(np.object_)), shape)
