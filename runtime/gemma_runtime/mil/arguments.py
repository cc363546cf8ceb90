"""What operations read their arguments with. A wrong kind of value is a Damaged program."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from gemma_runtime.mil.blob import Array, Nibbles
from gemma_runtime.mil.package import Value
from gemma_runtime.mil.weights import BlockWeight, Floats, PlainWeight, TableWeight, Weight, dense
from gemma_runtime.mil.wire import Damaged

Arguments: TypeAlias = Mapping[str, Value]
Result: TypeAlias = Array | list[Array]
Operation: TypeAlias = Callable[[Arguments], Result]


def array(arguments: Arguments, name: str) -> Array:
    """The value as it is stored; a compressed weight as a whole."""
    if name not in arguments:
        raise Damaged(f"argument {name} is missing")
    return as_array(arguments[name])


def as_array(value: Value) -> Array:
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    if isinstance(value, Nibbles):
        return value.unpack()
    if isinstance(value, BlockWeight | TableWeight | PlainWeight):
        return dense(value)
    raise Damaged("a text or a list where a tensor is expected")


def weight(arguments: Arguments, name: str) -> Weight:
    """A matrix that may be compressed."""
    given = arguments.get(name)
    if isinstance(given, BlockWeight | TableWeight | PlainWeight):
        return given
    values = array(arguments, name)
    if values.ndim != 2:
        raise Damaged(f"{name} is {values.shape}, expected a matrix")
    return PlainWeight(values)


def arrays(arguments: Arguments, name: str) -> list[Array]:
    given = arguments.get(name)
    if not isinstance(given, list):
        raise Damaged(f"{name} is no list of values")
    return [as_array(item) for item in given]


def floats(arguments: Arguments, name: str) -> Floats:
    return array(arguments, name).astype(np.float32, copy=False)


def numeric(arguments: Arguments, name: str) -> Array:
    """Float16 widened to float32; whole numbers as they are."""
    found = array(arguments, name)
    return found.astype(np.float32) if found.dtype == np.float16 else found


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
    given = arguments.get(name, default)
    if not isinstance(given, str):
        raise Damaged(f"{name} is no text")
    return given
