"""Parses a Core ML model file into frozen data: functions, operations, types and constants.

Field numbers are those of coremltools' `Model.proto` and `MIL.proto`.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from gemma_runtime.formats.protobuf import Damaged, ProtoMessage

# MIL's DataType numbers. int4 and uint4 are stored in bytes.
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
MAX_ELEMENTS = 1 << 30  # per tensor; Gemma 2 27b's largest cache at 8192 tokens has 2^29.6


@dataclass(frozen=True, slots=True)
class TensorType:
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Constant:
    """A value stored in the model file itself, or in a weight file."""

    type: TensorType | None  # None for strings and lists
    file: str | None  # None if the value is in the model file
    offset: int  # of the record in the weight file, in bytes
    immediate: bytes  # the serialized ImmediateValue


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference, by name, to an input, a state or another operation's output."""

    name: str


Binding: TypeAlias = Reference | Constant


@dataclass(frozen=True, slots=True)
class NamedType:
    name: str
    type: TensorType
    is_state: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    kind: str
    name: str  # the name of its first output
    inputs: dict[str, tuple[Binding, ...]]
    outputs: tuple[NamedType, ...]
    attributes: dict[str, Constant]


class Function:
    """Inputs and outputs by name; `operations()` parses the operations."""

    def __init__(self, data: bytes) -> None:
        function = ProtoMessage(data)
        opset, blocks = function.text(2), function.mapping(3)
        if opset not in blocks:
            raise Damaged(f"the function has no block of operations for opset {opset!r}")
        self.inputs = {n.name: n for n in map(_named, function.messages(1))}
        self._block = ProtoMessage(blocks[opset])
        self.outputs = tuple(self._block.texts(2))

    def operations(self) -> list[Operation]:
        return [_operation(operation) for operation in self._block.messages(3)]


def read_functions(data: bytes) -> dict[str, Function]:
    """The functions of an ML Program by name; empty for any other model type. Raises Damaged."""
    program = ProtoMessage(data).message(502)
    return {name: Function(function) for name, function in program.mapping(2).items()}


def check_elements(name: str, shape: tuple[int, ...]) -> None:
    """Raise Damaged for a tensor that is too large, before any memory is allocated for it."""
    if math.prod(shape) > MAX_ELEMENTS:
        raise Damaged(f"{name} has the shape {shape}, more than {MAX_ELEMENTS} elements")


def _operation(operation: ProtoMessage) -> Operation:
    outputs = tuple(map(_named, operation.messages(3)))
    kind = operation.text(1)
    return Operation(
        kind,
        outputs[0].name if outputs else kind,
        {key: _bindings(ProtoMessage(value)) for key, value in operation.mapping(2).items()},
        outputs,
        {key: _constant(ProtoMessage(value)) for key, value in operation.mapping(5).items()},
    )


def _bindings(argument: ProtoMessage) -> tuple[Binding, ...]:
    return tuple(
        _constant(binding.message(2)) if 2 in binding else Reference(binding.text(1))
        for binding in argument.messages(1)
    )


def _constant(value: ProtoMessage) -> Constant:
    declared, file = value.message(2), value.message(5)
    tensor = declared.message(1)
    is_tensor = 1 in declared and tensor.number(1) != _STRING
    return Constant(
        _tensor_type(tensor) if is_tensor else None,
        file.text(1) if 5 in value else None,
        file.number(2),
        value.data(3),
    )


def _named(named: ProtoMessage) -> NamedType:
    """Name and type of a tensor; for a state, the type of the tensor in it."""
    name, declared = named.text(1), named.message(2)
    if 5 in declared:
        wrapped = declared.message(5).message(1)
        return NamedType(name, _tensor_type(wrapped.message(1)), is_state=True)
    tensor = _tensor_type(declared.message(1))
    check_elements(name, tensor.shape)
    return NamedType(name, tensor)


def _tensor_type(tensor: ProtoMessage) -> TensorType:
    kind = tensor.number(1)
    dimensions = list(tensor.messages(3))
    if any(2 in dimension for dimension in dimensions):
        raise Damaged("a tensor has a flexible shape; only fixed shapes are supported")
    shape = tuple(dimension.message(1).number(1) for dimension in dimensions)
    return TensorType(DTYPES.get(kind, np.dtype(np.object_)), shape)
