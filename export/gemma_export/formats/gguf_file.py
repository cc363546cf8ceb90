"""Reads tensors of GGUF files by rows, without mapping the file."""

from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from gemma_export.formats.downloaded import check_downloaded
from gemma_runtime.errors import CheckpointError
from gemma_runtime.formats.gguf import GgufHeader, GgufTensor, read_gguf_header


def read_header(path: Path) -> GgufHeader:
    """Read the header, and check that the tensors fill the file and have supported types.

    Raises CheckpointError.
    """
    check_downloaded(path)
    try:
        return read_gguf_header(path)
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_rows(path: Path, tensor: GgufTensor, start: int, stop: int) -> NDArray[np.float32]:
    """Rows [start, stop) of a tensor, dequantized."""
    data = read_blocks(path, tensor, start, stop)
    with np.errstate(all="ignore"):  # a damaged scale gives NaN or Inf, which callers check
        values: NDArray[np.float32] = dequantize(data, GGMLQuantizationType(tensor.type))
    return values.reshape(stop - start, *tensor.shape[1:])


def read_blocks(path: Path, tensor: GgufTensor, start: int, stop: int) -> NDArray[np.uint8]:
    """The stored bytes of rows [start, stop) of a tensor: (rows, bytes per row)."""
    data = np.empty((stop - start, tensor.row_bytes), np.uint8)
    with path.open("rb", buffering=0) as file:
        file.seek(tensor.offset + start * tensor.row_bytes)
        if file.readinto(data.data) != data.nbytes:
            raise CheckpointError(f"{path} ended inside a tensor; download it again")
    return data
