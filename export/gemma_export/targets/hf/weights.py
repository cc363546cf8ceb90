"""Writes the store as `model.safetensors`. N rows, K inputs, G groups per row.

A linear layer's codes are stored as `weight_packed`: int32 words, the earlier code in the lower
bits, offset by 2^(bits-1), so their bytes are the store's. `weight_scale` is (N, G) float16,
`weight_shape` is N and K. Source: compressed-tensors `compressors/pack_quantized`.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.safetensors import SafetensorsWriter
from gemma_export.model.config import TABLE
from gemma_export.progress import Tick
from gemma_export.quantize.store import QuantizedStore, StoredWeight
from gemma_runtime.errors import TargetError
from gemma_runtime.formats.safetensors import TensorInfo

_Rows = Callable[[int, int], Tensor]


def write_weights(store: QuantizedStore, path: Path, progress: Tick) -> None:
    """Every tensor under its Hugging Face name, a block of rows at a time."""
    weights = [store.weight(name) for name in store.shapes]
    layout = {key: info for weight in weights for key, info in _layout(weight).items()}
    with SafetensorsWriter(path, layout, {"format": "pt"}) as writer:
        for weight in weights:
            for part, rows in _parts(weight).items():
                _write(writer, part, layout[part], rows, progress)


def write_table_scales(table: StoredWeight, path: Path) -> None:
    """The scales of a quantized table; with them its codes can be read back."""
    info = TensorInfo("F16", (table.shape[0], table.shape[1] // table.format.group))
    with SafetensorsWriter(path, {table.name: info}, {}) as writer:
        for start, stop in row_blocks(info.shape):
            writer.write_rows(table.name, start, _bytes(table.part("scales", start, stop)))


def _layout(weight: StoredWeight) -> dict[str, TensorInfo]:
    name, shape, fmt = weight.name, weight.shape, weight.format
    if fmt.is_float:
        return {name: TensorInfo(_float_type(weight), shape)}
    if name == TABLE:
        return {name: TensorInfo("F16", shape)}
    rows, width = shape
    return {
        f"{name}_packed": TensorInfo("I32", (rows, width * fmt.bits // 32)),
        f"{name}_scale": TensorInfo("F16", (rows, width // fmt.group)),
        f"{name}_shape": TensorInfo("I64", (2,)),
    }


def _float_type(weight: StoredWeight) -> str:
    """BF16 if it holds every value exactly, as it does for a bfloat16 checkpoint."""
    blocks = (weight.rows(*span) for span in row_blocks(weight.shape))
    exact = all(torch.equal(block.bfloat16().float(), block) for block in blocks)
    return "BF16" if exact else "F32"


def _parts(weight: StoredWeight) -> dict[str, _Rows]:
    """The stored tensors of a weight, each as a function that reads its rows."""
    name, fmt = weight.name, weight.format
    if fmt.is_float:
        return {name: weight.rows}
    if name == TABLE:
        return {name: lambda start, stop: _half(weight, start, stop)}
    shape = torch.tensor(weight.shape)
    return {
        f"{name}_packed": lambda start, stop: weight.part("codes", start, stop),
        f"{name}_scale": lambda start, stop: weight.part("scales", start, stop),
        f"{name}_shape": lambda start, stop: shape[start:stop],
    }


def _half(weight: StoredWeight, start: int, stop: int) -> Tensor:
    half = weight.rows(start, stop).half()
    if not bool(torch.isfinite(half).all()):
        raise TargetError(
            f"hf can't store {weight.name}: a value exceeds float16's 65504; choose another target"
        )
    return half


_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def _write(
    writer: SafetensorsWriter, name: str, info: TensorInfo, rows: _Rows, progress: Tick
) -> None:
    for start, stop in row_blocks(info.shape):
        block = rows(start, stop)
        data = _bytes(block.to(_FLOATS[info.dtype]) if info.dtype in _FLOATS else block)
        writer.write_rows(name, start, data)
        progress(name, data.nbytes)


def _bytes(rows: Tensor) -> NDArray[np.uint8]:
    data: NDArray[np.uint8] = rows.contiguous().view(torch.uint8).numpy()
    return data
