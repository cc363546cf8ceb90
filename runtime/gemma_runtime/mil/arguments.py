"""Reads an operation's arguments by name and type. Raises Damaged for a value of another type."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from gemma_runtime.formats.protobuf import Damaged
from gemma_runtime.mil.blob import Array, Nibbles
from gemma_runtime.mil.package import MilValue
from gemma_runtime.mil.weights import BlockWeight, Floats, PlainWeight, TableWeight, Weight, dense

Arguments: TypeAlias = Mapping[str, MilValue]
Result: TypeAlias = Array | list[Array]
Kernel: TypeAlias = Callable[[Arguments], Result]


def array(arguments: Arguments, name: str) -> Array:
    """The value in its stored type; a compressed weight is dequantized."""
    if name not in arguments:
        raise Damaged(f"argument {name} is missing")
    return as_array(arguments[name])


def as_array(value: MilValue) -> Array:
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    if isinstance(value, Nibbles):
        return value.unpack()
    if isinstance(value, BlockWeight | TableWeight | PlainWeight):
        return dense(value)
    raise Damaged("found a string or a list, expected a tensor")


def weight(arguments: Arguments, name: str) -> Weight:
    """A matrix, (N, K), compressed or plain."""
    value = arguments.get(name)
    if isinstance(value, BlockWeight | TableWeight | PlainWeight):
        return value
    values = array(arguments, name)
    if values.ndim != 2:
        raise Damaged(f"{name} is {values.shape}, expected a matrix")
    return PlainWeight(values)


def arrays(arguments: Arguments, name: str) -> list[Array]:
    values = arguments.get(name)
    if not isinstance(values, list):
        raise Damaged(f"{name} is not a list of tensors")
    return [as_array(value) for value in values]


def floats(arguments: Arguments, name: str) -> Floats:
    return array(arguments, name).astype(np.float32, copy=False)


def numeric(arguments: Arguments, name: str) -> Array:
    """The value, with float16 converted to float32; other types unchanged."""
    value = array(arguments, name)
    return value.astype(np.float32) if value.dtype == np.float16 else value


def integers(arguments: Arguments, name: str) -> tuple[int, ...]:
    return tuple(int(n) for n in np.reshape(array(arguments, name), -1))


def integer(arguments: Arguments, name: str, default: int | None = None) -> int:
    if name not in arguments and default is not None:
        return default
    return int(array(arguments, name).item())


def number(arguments: Arguments, name: str, default: float | None = None) -> np.float32:
    if name not in arguments and default is not None:
        return np.float32(default)
    return np.float32(array(arguments, name).item())


def flag(arguments: Arguments, name: str) -> bool:
    return name in arguments and bool(array(arguments, name).item())


def text(arguments: Arguments, name: str, default: str) -> str:
    value = arguments.get(name, default)
    if not isinstance(value, str):
        raise Damaged(f"{name} is not a string")
    return value
