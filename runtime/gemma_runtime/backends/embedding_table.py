"""Embedding tables outside the model: mapped safetensors files; a token reads one row of each.

A file has `values`, or `codes`, `scales` and optionally `zeros`, laid out as in the quantized
store: unsigned codes, two per byte at 4 bits with the earlier one in the low half. A value is
scale · (code - zero); zero is 2^(bits-1) if the file has no zeros.
T tokens, M width, G groups per row.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import BundleError
from gemma_runtime.formats.safetensors import TensorInfo, read_safetensors_header
from gemma_runtime.manifest import Graph, TensorRole

# Role of the input that takes a table's rows → role of the file.
_FILES = {TensorRole.EMBEDDINGS: "embedding", TensorRole.PER_LAYER: "per_layer"}
_DTYPES = {"F32": np.float32, "F16": np.float16, "U8": np.uint8}


class EmbeddingTable:
    """Looks up rows of a table of a given width."""

    def __init__(self, path: Path, width: int) -> None:
        """Map the file. Raises BundleError if it is not such a table."""
        self._parts = _map_tensors(path)
        self._width = width
        names = set(self._parts) - {"zeros"}
        if names not in ({"values"}, {"codes", "scales"}):
            raise BundleError(
                f"{path} has tensors {sorted(self._parts)}; expected codes and scales"
            )
        if "codes" in names:
            self._bits = self._parts["codes"].shape[1] * 8 // width
        found = self._parts["values"].shape[1] if "values" in names else self._bits
        if found not in ((width,) if "values" in names else (4, 8)):
            raise BundleError(
                f"the rows of {path} do not have {width} values; export the model again"
            )

    def rows(self, tokens: Sequence[int]) -> NDArray[np.float16]:
        """(T, M), rounded to the float16 that the model takes."""
        if "values" in self._parts:
            values: NDArray[np.float16] = self._parts["values"][tokens].astype(np.float16)
            return values
        scales = self._parts["scales"][tokens].astype(np.float32)  # (T, G)
        count, groups = scales.shape
        codes = self._unpacked("codes", tokens, self._width).reshape(count, groups, -1)
        zeros = np.full_like(scales, 1 << (self._bits - 1))
        if "zeros" in self._parts:
            zeros = self._unpacked("zeros", tokens, groups)
        products = (codes - zeros[..., None]) * scales[..., None]
        return products.reshape(count, -1).astype(np.float16)

    def _unpacked(self, name: str, tokens: Sequence[int], count: int) -> NDArray[np.float32]:
        packed = self._parts[name][tokens]
        if self._bits == 4:
            packed = np.stack((packed & 0xF, packed >> 4), -1).reshape(len(packed), -1)
        unpacked: NDArray[np.float32] = packed[:, :count].astype(np.float32)
        return unpacked


def open_tables(bundle: Bundle, graph: Graph) -> dict[TensorRole, EmbeddingTable]:
    """The tables whose rows a graph takes as inputs. Raises BundleError if one is missing."""
    return {
        spec.role: EmbeddingTable(bundle.path(_FILES[spec.role]), int(spec.shape[1]))
        for spec in graph.inputs
        if spec.role in _FILES
    }


def _map_tensors(path: Path) -> Mapping[str, NDArray[Any]]:
    """Every tensor as a view of the mapped file."""
    try:
        tensors, _ = read_safetensors_header(path)
        data = np.memmap(path, np.uint8, "r")
        return {name: _view(data, name, info) for name, info in tensors.items()}
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} {error}; copy or export the bundle again") from error


def _view(data: NDArray[np.uint8], name: str, info: TensorInfo) -> NDArray[Any]:
    if info.dtype not in _DTYPES or len(info.shape) != 2:
        raise ValueError(f"has {name} of {info.dtype} and shape {info.shape}, expected rows")
    span = data[info.offset : info.offset + info.bytes]
    return span.view(_DTYPES[info.dtype]).reshape(info.shape)
