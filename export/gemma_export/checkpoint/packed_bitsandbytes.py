"""Reads bitsandbytes matrices: nf4, fp4, and int8 per row. Source: its `functional.py`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from gemma_export.checkpoint.packed import FLOATS, Holder, Parts
from gemma_export.checkpoint.prequantized import Stored
from gemma_export.formats.codes import Codes
from gemma_runtime.errors import CheckpointError
from gemma_runtime.formats.json_bytes import decode_json

# `bnb_4bit_quant_storage`: the same bytes under another dtype.
_STORAGES = ("U8", "I8", "F16", "BF16", "F32")


class _State(msgspec.Struct, frozen=True):
    """The fields of `quant_state` that are read."""

    quant_type: str
    blocksize: int
    shape: tuple[int, int]
    nested_blocksize: int | None = None
    nested_offset: float = 0.0


@dataclass(frozen=True)
class Int8Rows:
    """One scale per row, of 127 steps."""

    shape: tuple[int, ...]
    parts: Parts

    def rows(self, start: int, stop: int) -> Tensor:
        scales = self.parts.read("SCB", start, stop).float() / 127
        return self.parts.read("weight", start, stop).float() * scales[:, None]

    def stored(self) -> Stored:
        return Stored("bitsandbytes int8")

    def codes(self, start: int, stop: int) -> Codes:
        raise AssertionError(self.parts.module)


@dataclass(frozen=True)
class Blocks4:
    """nf4 or fp4: a table of 16 values, and one scale per block of the flat matrix."""

    parts: Parts
    state: _State

    @property
    def shape(self) -> tuple[int, ...]:
        return self.state.shape

    def rows(self, start: int, stop: int) -> Tensor:
        width = self.shape[1]
        packed = self._bytes(start * width // 2, stop * width // 2)
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten().long()
        block_of = torch.arange(start * width, stop * width) // self.state.blocksize
        values = self.parts.read("weight.quant_map")[codes]
        return (values * self._scales()[block_of]).view(stop - start, width)

    def stored(self) -> Stored:
        return Stored(f"bitsandbytes {self.state.quant_type}")

    def codes(self, start: int, stop: int) -> Codes:
        raise AssertionError(self.parts.module)

    def _bytes(self, start: int, stop: int) -> Tensor:
        """Bytes [start, stop) of the packed weight, whatever dtype holds them."""
        rows = self.parts.shape("weight", _STORAGES)[0]
        per_row = self.shape[0] * self.shape[1] // 2 // rows
        first, last = start // per_row, -(-stop // per_row)
        data = self.parts.read("weight", first, last).contiguous().view(torch.uint8).flatten()
        return data[start - first * per_row : stop - first * per_row]

    def _scales(self) -> Tensor:
        """One scale per block, dequantized first if the scales are quantized too."""
        scales = self.parts.read("weight.absmax")
        if self.state.nested_blocksize is None:
            return scales
        outer = torch.arange(len(scales)) // self.state.nested_blocksize
        looked_up = self.parts.read("weight.nested_quant_map")[scales.long()]
        return looked_up * self.parts.read("weight.nested_absmax")[outer] + self.state.nested_offset


def bitsandbytes_matrix(
    parts: Parts, config: Mapping[str, Any], holder: Holder
) -> Int8Rows | Blocks4:
    """4 bits: `weight` (N · K / 2, 1) and quant_state, JSON as bytes. 8 bits: `weight`, `SCB`."""
    if "SCB" in parts:
        rows, inputs = parts.shape("weight", ("I8",), 2)
        parts.check("SCB", FLOATS, rows)
        return Int8Rows((rows, inputs), parts)
    matrix = Blocks4(parts, _read_state(parts))
    _check_blocks(parts, matrix.state)
    return matrix


def _read_state(parts: Parts) -> _State:
    part = next((name for name in parts.places if "quant_state" in name), "weight.quant_state")
    parts.shape(part, ("U8",), 1)
    try:
        state = decode_json(bytes(parts.read(part).tolist()), _State)
    except msgspec.DecodeError as error:
        raise CheckpointError(
            f"{parts.module}.{part} is not bitsandbytes' JSON ({error}); save the model again"
        ) from error
    sizes = (*state.shape, state.blocksize, state.nested_blocksize or 1)
    if min(sizes) < 1 or state.shape[1] % 2 or state.quant_type not in ("nf4", "fp4"):
        raise CheckpointError(
            f"{parts.module}.{part} describes {state.quant_type!r:.20} of shape {state.shape} in "
            f"blocks of {state.blocksize}, expected nf4 or fp4; save the model again"
        )
    return state


def _check_blocks(parts: Parts, state: _State) -> None:
    size = state.shape[0] * state.shape[1]
    shape = parts.shape("weight", _STORAGES)
    width = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}[parts.dtype("weight")]
    if len(shape) > 2 or shape[0] * (shape[1] if shape[1:] else 1) * width * 2 != size:
        raise parts.error("weight", f"{size // 2} bytes for a matrix of shape {state.shape}")
    blocks = -(-size // state.blocksize)
    parts.check("weight.quant_map", FLOATS, 16)
    if state.nested_blocksize is None:
        parts.check("weight.absmax", FLOATS, blocks)
        return
    parts.check("weight.absmax", ("U8",), blocks)
    parts.check("weight.nested_quant_map", FLOATS, 256)
    parts.check("weight.nested_absmax", FLOATS, -(-blocks // state.nested_blocksize))
