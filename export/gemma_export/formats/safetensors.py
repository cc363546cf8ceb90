"""Reads and writes safetensors by rows, without mapping the file, so memory stays at one block.

The format: 8 bytes of header length, a JSON header, the tensors back to back
(https://github.com/huggingface/safetensors#format).
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma_runtime.errors import CheckpointError

MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation
_DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    offset: int = 0  # from the start of the file

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * _DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


class SafetensorsFile:
    """A file whose header is checked on opening. Data is read by rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors, self.metadata = _read_header(path)

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self.tensors[name].dtype]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in the file's dtype."""
        info = self.tensors[name]
        data = torch.empty((stop - start, *info.shape[1:]), dtype=_DTYPES[info.dtype])
        buffer = data.view(torch.uint8).numpy().reshape(-1).data
        with self.path.open("rb", buffering=0) as file:
            file.seek(info.offset + start * info.row_bytes)
            if file.readinto(buffer) != len(buffer):
                raise CheckpointError(f"{self.path} ended inside tensor {name}; copy it again")
        return data

    def overwrite(self, name: str, data: Tensor) -> None:
        """Replace a tensor in place by another of its dtype and shape."""
        info = self.tensors[name]
        assert (data.dtype, tuple(data.shape)) == (_DTYPES[info.dtype], info.shape)
        with self.path.open("r+b", buffering=0) as file:
            content = data.contiguous().view(torch.uint8).numpy().tobytes()
            _write_all(file.fileno(), content, info.offset)


class SafetensorsWriter:
    """Writes tensors of known shapes, with rows in any order."""

    def __init__(
        self, path: Path, layout: Mapping[str, TensorInfo], metadata: Mapping[str, str]
    ) -> None:
        self._metadata = dict(metadata)
        self._layout, self._header = _lay_out(layout, self._metadata)
        self._file = path.open("wb", buffering=0)

    def write_rows(self, name: str, start: int, data: NDArray[np.uint8]) -> None:
        info = self._layout[name]
        _write_all(self._file.fileno(), data.tobytes(), info.offset + start * info.row_bytes)

    def patch_metadata(self, key: str, value: str) -> None:
        """Replace a metadata value, such as a digest, by one of the same length."""
        assert len(value) == len(self._metadata[key])
        old = msgspec.json.encode(self._metadata)
        self._metadata[key] = value
        self._header = self._header.replace(old, msgspec.json.encode(self._metadata), 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        with self._file:
            if kind is None:
                _write_all(self._file.fileno(), self._header, 0)


def _lay_out(
    layout: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[dict[str, TensorInfo], bytes]:
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, info in layout.items():
        span = [end, end + info.bytes]
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": span}
        end += info.bytes
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    placed, end = {}, start
    for name, info in layout.items():
        placed[name] = TensorInfo(info.dtype, info.shape, end)
        end += info.bytes
    return placed, len(text).to_bytes(8, "little") + text


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{path} is not a complete safetensors file: the header claims {length} bytes, the "
                f"file has {size}; download it again"
            )
        text = file.read(length)
    try:
        header = msgspec.json.decode(text, type=dict[str, dict[str, Any]])
        metadata = header.pop("__metadata__", {})
        tensors = {name: _info(name, entry, 8 + length) for name, entry in header.items()}
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a broken safetensors header: {error}") from error
    _check_spans(path, tensors, 8 + length, size)
    return tensors, {str(k): str(v) for k, v in metadata.items()}


def _info(name: str, entry: Mapping[str, Any], start: int) -> TensorInfo:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if dtype not in _DTYPES:
        raise ValueError(f"tensor {name} is {dtype}, expected one of {', '.join(_DTYPES)}")
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"tensor {name} has shape {shape} at {begin}…{end}")
    info = TensorInfo(dtype, shape, start + begin)
    if info.bytes != end - begin:
        raise ValueError(f"tensor {name} needs {info.bytes} bytes, its span has {end - begin}")
    return info


def _check_spans(path: Path, tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
    """Check that the tensors fill the file without holes or overlaps."""
    end = start
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.bytes)):
        if info.offset != end:
            raise CheckpointError(f"{path}: tensors overlap or leave a hole at byte {end}")
        end += info.bytes
    if end != size:
        raise CheckpointError(
            f"{path} has {size} bytes, its header describes {end}; download it again"
        )
