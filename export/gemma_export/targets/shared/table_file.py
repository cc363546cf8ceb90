"""Writes tables that the caller looks up to files of their own.

`gemma_runtime.backends.embedding_table` reads them.
"""

from pathlib import Path

import torch
from torch import Tensor

from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.safetensors import SafetensorsWriter
from gemma_export.model.config import PER_LAYER_TABLE, TABLE
from gemma_export.quantize.store import QuantizedStore, StoredWeight, parts_layout
from gemma_export.targets.shared.apple_layout import Layout
from gemma_export.targets.shared.float16 import check_scales, half
from gemma_runtime.formats.safetensors import TensorInfo

# Role in the manifest → weight and file.
_EMBEDDING = ("embedding", TABLE, "embedding.safetensors")
_PER_LAYER = ("per_layer", PER_LAYER_TABLE, "per-layer.safetensors")


def write_tables(store: QuantizedStore, layout: Layout, folder: Path) -> dict[str, str]:
    """Write the tables outside the program; returns their files by role in the manifest."""
    outside = [_EMBEDDING] * layout.external + [_PER_LAYER] * (layout.config.per_layer > 0)
    for _, name, file in outside:
        write_table(store.weight(name), folder / file)
    return {role: file for role, _, file in outside}


def write_table(table: StoredWeight, path: Path) -> None:
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
        return {"values": half(table.name, table.rows(start, stop))}
    codes = table.codes(start, stop)
    check_scales(table.name, codes.scales, table.format)
    return codes.parts()
