"""Writes the store as `model.safetensors`. N rows, K inputs, G groups per row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.format import Format
from gemma_export.formats.safetensors import SafetensorsWriter
from gemma_export.model.config import PER_LAYER_TABLE, TABLE, is_gain
from gemma_export.progress import Tick
from gemma_export.quantize.store import StoredWeight
from gemma_export.targets import ExportJob
from gemma_runtime.errors import TargetError
from gemma_runtime.formats.safetensors import TensorInfo

LOOKED_UP = (TABLE, PER_LAYER_TABLE)  # embeddings, which no format of linear layers holds
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the file, and the function that reads its rows [start, stop)."""

    info: TensorInfo
    rows: Callable[[int, int], Tensor]
    step: int | None = None  # rows read at a time


@dataclass(frozen=True, slots=True)
class Packing:
    """How quantized matrices are stored: a value of --hf-format."""

    parts: Callable[[StoredWeight], dict[str, Part]]
    config: Callable[[Mapping[str, Format]], dict[str, Any] | None]  # `quantization_config`
    packages: tuple[str, ...]  # with which transformers loads them


def write_weights(job: ExportJob, path: Path, packing: Packing, progress: Tick) -> None:
    """Every tensor under its Hugging Face name, a block of rows at a time."""
    parts: dict[str, Part] = {}
    for name in job.store.shapes:
        weight: StoredWeight | _Gain = job.store.weight(name)
        if job.config.plain_gains and is_gain(name):
            weight = _Gain(job.store.weight(name))
        own = _parts(weight, packing)
        parts |= {job.config.hf_name(part): content for part, content in own.items()}
    layout = {name: part.info for name, part in parts.items()}
    with SafetensorsWriter(path, layout, {"format": "pt"}) as writer:
        for name, part in parts.items():
            for start, stop in row_blocks(part.info.shape, part.step):
                rows = part.rows(start, stop)
                dtype = _FLOATS.get(part.info.dtype, rows.dtype)
                writer.write_rows(name, start, data := _bytes(rows.to(dtype)))
                progress(name, data.nbytes)


def write_table_scales(tables: Sequence[StoredWeight], path: Path) -> None:
    """The scales of quantized tables; with them their codes can be read back."""
    layout = {
        table.name: TensorInfo("F16", (table.shape[0], table.shape[1] // table.format.group))
        for table in tables
    }
    with SafetensorsWriter(path, layout, {}) as writer:
        for table in tables:
            for start, stop in row_blocks(layout[table.name].shape):
                writer.write_rows(table.name, start, _bytes(table.part("scales", start, stop)))


@dataclass(frozen=True, slots=True)
class _Gain:
    """The gain of a norm as the checkpoint has it; the store has gain - 1."""

    stored: StoredWeight

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def rows(self, start: int, stop: int) -> Tensor:
        return self.stored.rows(start, stop) + 1


def _parts(weight: StoredWeight | _Gain, packing: Packing) -> dict[str, Part]:
    if isinstance(weight, _Gain) or weight.format.is_float:
        return {weight.name: Part(TensorInfo(_float_type(weight), weight.shape), weight.rows)}
    if weight.name in LOOKED_UP:
        half = Part(TensorInfo("F16", weight.shape), partial(_half, weight))
        return {weight.name: half}
    return packing.parts(weight)


def _float_type(weight: StoredWeight | _Gain) -> str:
    """BF16 if it holds every value exactly, as it does for a bfloat16 checkpoint."""
    blocks = (weight.rows(*span) for span in row_blocks(weight.shape))
    exact = all(torch.equal(block.bfloat16().float(), block) for block in blocks)
    return "BF16" if exact else "F32"


def _half(weight: StoredWeight, start: int, stop: int) -> Tensor:
    half = weight.rows(start, stop).half()
    if not bool(torch.isfinite(half).all()):
        raise TargetError(
            f"hf can't store {weight.name}: a value exceeds float16's 65504; choose another target"
        )
    return half


def _bytes(rows: Tensor) -> NDArray[np.uint8]:
    data: NDArray[np.uint8] = rows.contiguous().view(torch.uint8).numpy()
    return data
