"""Opens an `.mlpackage`: reads the program's functions and its constants."""

import json
import math
from pathlib import Path
from typing import TypeAlias

import numpy as np

from gemma_runtime.errors import SessionError
from gemma_runtime.formats.names import stays_inside
from gemma_runtime.formats.protobuf import Damaged, ProtoMessage
from gemma_runtime.mil.blob import Array, Nibbles, WeightFile
from gemma_runtime.mil.model import Constant, TensorType, read_functions
from gemma_runtime.mil.weights import Weight

MilValue: TypeAlias = "Array | Nibbles | Weight | str | list[MilValue]"

_MAX_REPEATED = 1 << 16  # elements to which one stored value may be repeated
_FLOATS, _INTS, _BOOLS, _STRINGS, _LONGS, _DOUBLES, _BYTES = range(1, 8)
_FLOAT_TYPES = {_FLOATS: "<f4", _DOUBLES: "<f8"}


class Package:
    """A saved model. `functions` maps names to functions."""

    def __init__(self, path: Path) -> None:
        """Raises SessionError if it isn't an ML Program, or if a path leads out of the package."""
        self._path = path
        self._model = _model_file(path)
        try:
            self.functions = read_functions(self._model.read_bytes())
        except (OSError, Damaged) as error:
            raise SessionError(f"{path} can't be read as a Core ML model: {error}") from error
        if not self.functions:
            raise SessionError(f"{path} is not an ML Program; export it for iOS 15 or newer")
        self._weights: dict[str, WeightFile] = {}

    def value(self, constant: Constant) -> MilValue:
        """The value of a constant, from the weight file or the model file. Raises Damaged."""
        if constant.file is not None:
            if constant.type is None:
                raise Damaged("a string or a list is stored in the weight file; expected a tensor")
            return self._file(constant.file).read(constant.offset, constant.type.shape)
        return _immediate(ProtoMessage(constant.immediate), constant.type)

    def _file(self, name: str) -> WeightFile:
        if name not in self._weights:
            relative = name.removeprefix("@model_path/")
            self._weights[name] = WeightFile(_inside(self._path, self._model.parent, relative))
        return self._weights[name]


def _immediate(value: ProtoMessage, declared: TensorType | None) -> MilValue:
    if 3 in value:
        return [_text(item.message(3).message(1)) for item in value.message(3).messages(1)]
    tensor = value.message(1)
    return _text(tensor) if declared is None else _tensor(tensor, declared)


def _text(tensor: ProtoMessage) -> str:
    texts = list(tensor.message(_STRINGS).every(1))
    if not texts:
        raise Damaged("a string constant has no value")
    return texts[0].decode(errors="replace")


def _tensor(tensor: ProtoMessage, declared: TensorType) -> Array:
    kind = next((k for k in range(_FLOATS, _BYTES + 1) if k in tensor), None)
    if kind is None or declared.dtype == np.object_:
        raise Damaged("a constant has an unknown type")
    values = tensor.message(kind)
    if kind in (_FLOATS, _DOUBLES, _BYTES):
        stored = np.dtype(_FLOAT_TYPES[kind]) if kind in _FLOAT_TYPES else declared.dtype
        data = b"".join(values.every(1))
        if len(data) % stored.itemsize:
            raise Damaged(f"a constant has {len(data)} bytes, expected a multiple of {stored}")
        array: Array = np.frombuffer(data, stored).astype(declared.dtype)
    else:
        integers = np.array(values.numbers(1), np.uint64).view(np.int64)  # two's complement
        array = integers.astype(declared.dtype)
    count = math.prod(declared.shape)
    if array.size == 1 and count <= _MAX_REPEATED:  # one stored value fills the tensor
        return np.broadcast_to(array.reshape(()), declared.shape)
    if array.size != count:
        raise Damaged(f"a constant has {array.size} values, declared are {declared.shape}")
    return array.reshape(declared.shape)


def _model_file(path: Path) -> Path:
    try:
        manifest = json.loads((path / "Manifest.json").read_bytes())
        entry = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise SessionError(f"{path} is not an .mlpackage: Manifest.json: {error!r}") from error
    return _inside(path, path / "Data", str(entry))


def _inside(package: Path, folder: Path, name: str) -> Path:
    """The path of a file in the package. Raises SessionError if it or a link leads outside."""
    path = folder / name
    if not stays_inside(name) or not path.resolve().is_relative_to(package.resolve()):
        raise SessionError(f"{folder}: the model refers to {name!r}, outside the package")
    return path
