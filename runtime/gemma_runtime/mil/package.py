"""Opens an `.mlpackage`: the program's functions, and the values its operations name."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from gemma_runtime.errors import MissingExtra, SessionError
from gemma_runtime.mil.blob import Array, WeightFile
from gemma_runtime.quiet import quiet

if TYPE_CHECKING:
    from coremltools.proto import MIL_pb2

Value: TypeAlias = "Array | str | list[Value]"

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


@dataclass(frozen=True, slots=True)
class TensorType:
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]


class Package:
    """A saved model. `functions` are its programs by name."""

    def __init__(self, path: Path) -> None:
        """Raises SessionError for what is no ML Program, and for paths that leave the folder."""
        model = _read_model(path)
        self.functions = dict(model.mlProgram.functions)
        if not self.functions:
            raise SessionError(f"{path} holds no ML Program; export it for iOS 15 or newer")
        self._folder = _model_file(path).parent
        self._weights: dict[str, WeightFile] = {}

    def value(self, value: "MIL_pb2.Value") -> Value:
        """A constant: from the weight file, or from the model itself."""
        if value.WhichOneof("value") == "blobFileValue":
            place = value.blobFileValue
            return self._file(place.fileName).read(place.offset, tensor_type(value.type).shape)
        immediate = value.immediateValue
        if immediate.WhichOneof("value") == "list":
            return [self.value(item) for item in immediate.list.values]
        return _immediate(immediate.tensor, tensor_type(value.type))

    def _file(self, name: str) -> WeightFile:
        if name not in self._weights:
            relative = name.removeprefix("@model_path/")
            self._weights[name] = WeightFile(_inside(self._folder, relative))
        return self._weights[name]


def tensor_type(value_type: "MIL_pb2.ValueType") -> TensorType:
    """Type and shape of a tensor, or of the tensor that a state wraps."""
    if value_type.WhichOneof("type") == "stateType":
        value_type = value_type.stateType.wrappedType
    tensor = value_type.tensorType
    shape = tuple(int(dimension.constant.size) for dimension in tensor.dimensions)
    return TensorType(DTYPES.get(tensor.dataType, np.dtype(np.object_)), shape)


def _immediate(tensor: "MIL_pb2.TensorValue", declared: TensorType) -> Array | str:
    kind = tensor.WhichOneof("value")
    values = getattr(tensor, kind).values
    if kind == "strings":
        return str(values[0])
    if kind == "bytes":
        array: Array = np.frombuffer(values, declared.dtype)
    else:
        array = np.array(list(values), declared.dtype)
    if array.size == 1:  # one value may stand for all
        return np.broadcast_to(array.reshape(()), declared.shape)
    return array.reshape(declared.shape)


def _read_model(path: Path) -> "MIL_pb2.Model":
    try:
        with quiet():  # coremltools misses a Mac, and other versions of what is installed
            from coremltools.proto import Model_pb2
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError as error:
        raise MissingExtra("coremltools", "coreml") from error
    model = Model_pb2.Model()
    try:
        model.ParseFromString(_model_file(path).read_bytes())
    except (OSError, DecodeError) as error:
        raise SessionError(f"{path} can't be read as a Core ML model: {error}") from error
    return model


def _model_file(path: Path) -> Path:
    try:
        manifest = json.loads((path / "Manifest.json").read_bytes())
        entry = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SessionError(f"{path} is no .mlpackage: its Manifest.json says {error!r}") from error
    return _inside(path / "Data", str(entry))


def _inside(folder: Path, name: str) -> Path:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise SessionError(f"{folder}: the model names {name!r}, outside the package")
    return folder / pure
