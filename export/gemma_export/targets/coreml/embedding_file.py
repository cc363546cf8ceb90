"""Writes the embedding table to its own file, for callers that look embeddings up themselves.

`gemma_runtime.backends.embedding_table` reads it.
"""

from pathlib import Path

import torch
from torch import Tensor

from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.safetensors import SafetensorsWriter
from gemma_export.quantize.store import StoredWeight, parts_layout
from gemma_runtime.formats.safetensors import TensorInfo


def write_embedding(table: StoredWeight, path: Path) -> None:
    """Copy the table's codes, scales and zero points, or write its values as float16."""
    layout = {"values": TensorInfo("F16", table.shape)}
    if not table.format.is_float:
        layout = parts_layout(table.shape, table.format)
    with SafetensorsWriter(path, layout, {}) as writer:
        for start, stop in row_blocks(table.shape):
            for name, rows in _parts(table, start, stop).items():
                writer.write_rows(name, start, rows.contiguous().view(torch.uint8).numpy())


def _parts(table: StoredWeight, start: int, stop: int) -> dict[str, Tensor]:
    if table.format.is_float:
        return {"values": table.rows(start, stop).half()}
    return table.codes(start, stop).parts()
