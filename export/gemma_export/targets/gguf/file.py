"""Writes the store's codes and the model's metadata to a GGUF file."""

from pathlib import Path
from typing import BinaryIO

import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from gemma_export.checkpoint.gguf_layers import ROPE_FACTORS
from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.format import FLOAT
from gemma_export.formats.gguf_header import ALIGNMENT, write_header
from gemma_export.model.config import is_gain
from gemma_export.progress import Tick
from gemma_export.quantize.store import StoredWeight
from gemma_export.targets import ExportJob
from gemma_export.targets.gguf.block_types import block_type
from gemma_export.targets.gguf.blocks import pack_blocks
from gemma_export.targets.gguf.layers import rope_factors
from gemma_export.targets.gguf.metadata import generation_metadata, model_metadata
from gemma_export.targets.gguf.vocabulary import gguf_vocabulary
from gemma_runtime.contents.gguf_names import gguf_name


def write_gguf(job: ExportJob, path: Path, progress: Tick) -> None:
    metadata = model_metadata(job.checkpoint.id, job.config) | gguf_vocabulary(job.checkpoint)
    metadata |= generation_metadata(job.stop_tokens, job.checkpoint.generation.sampling, metadata)
    types = {name: _type(job, name) for name in job.store.shapes}
    infos = {gguf_name(n): (job.store.shapes[n], kind) for n, kind in types.items()}
    factors = rope_factors(job.config)
    if factors is not None:
        infos[ROPE_FACTORS] = (factors.shape, GGMLQuantizationType.F32)
    with path.open("wb") as file:
        write_header(file, metadata, infos)
        for name in types:
            _write_tensor(file, job.store.weight(name), progress)
        if factors is not None:
            file.write(factors.data)
            _pad(file)


def _type(job: ExportJob, name: str) -> GGMLQuantizationType:
    kind = block_type(job.store.formats.get(name, FLOAT))
    assert kind is not None, name  # `check` made sure
    return GGMLQuantizationType[kind]


def _write_tensor(file: BinaryIO, weight: StoredWeight, progress: Tick) -> None:
    for span in row_blocks(weight.shape):
        data = _block_rows(weight, *span).contiguous().view(torch.uint8).numpy()
        file.write(data.data)
        progress(weight.name, data.nbytes)
    _pad(file)


def _block_rows(weight: StoredWeight, start: int, stop: int) -> Tensor:
    if not weight.format.is_float:
        return pack_blocks(weight.name, weight.codes(start, stop), weight.format)
    rows = weight.rows(start, stop)
    return 1 + rows if is_gain(weight.name) else rows  # llama.cpp stores what norms multiply by


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))
