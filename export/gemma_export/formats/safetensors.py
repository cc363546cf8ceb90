"""Reads and writes safetensors by rows, without mapping the file, so memory stays at one block.

The format: 8 bytes of header length, a JSON header, the tensors back to back
(https://github.com/huggingface/safetensors#format).
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma_export.formats.downloaded import check_downloaded
from gemma_runtime.errors import CheckpointError
from gemma_runtime.formats.safetensors import TensorInfo, lay_out, read_safetensors_header

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
}


class SafetensorsFile:
    """A file whose header is checked on opening. Data is read by rows, and moved to `device`."""

    def __init__(self, path: Path, device: torch.device | None = None) -> None:
        """Without a device, data stays on the host."""
        self.path, self._device = path, device
        check_downloaded(path)
        try:
            self.tensors, self.metadata = read_safetensors_header(path)
        except ValueError as error:
            raise CheckpointError(f"{path} {error}; download it again") from error

    def dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self.tensors[name].dtype]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in the file's dtype."""
        shape = self.tensors[name].shape[1:]
        return self._read(name, start * math.prod(shape), (stop - start, *shape))

    def _read(self, name: str, first: int, shape: tuple[int, ...]) -> Tensor:
        """Elements of this shape, from element `first` on."""
        info = self.tensors[name]
        data = torch.empty(shape, dtype=_DTYPES[info.dtype])
        buffer = data.view(torch.uint8).numpy().reshape(-1).data
        with self.path.open("rb", buffering=0) as file:
            file.seek(info.offset + first * data.element_size())
            if file.readinto(buffer) != len(buffer):
                raise CheckpointError(f"{self.path} ended inside tensor {name}; copy it again")
        return data.to(self._device)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns [start, stop) of a matrix in the file's dtype. Reads only those."""
        rows, width = self.tensors[name].shape
        parts = [self._read(name, row * width + start, (stop - start,)) for row in range(rows)]
        return torch.stack(parts)

    def overwrite(self, name: str, data: Tensor) -> None:
        """Replace a tensor in place by another of its dtype and shape."""
        info = self.tensors[name]
        assert (data.dtype, tuple(data.shape)) == (_DTYPES[info.dtype], info.shape)
        with self.path.open("r+b", buffering=0) as file:
            content = data.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            _write_all(file.fileno(), content, info.offset)


class SafetensorsWriter:
    """Writes tensors of known shapes, with rows in any order."""

    def __init__(
        self, path: Path, layout: Mapping[str, TensorInfo], metadata: Mapping[str, str]
    ) -> None:
        self._metadata = dict(metadata)
        self._layout, self._header = lay_out(layout, self._metadata)
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


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
