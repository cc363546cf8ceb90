"""The quantized store: a safetensors file with all weights, which every target reads.

A quantized matrix T is stored as `T.codes`, `T.scales` and `T.zeros`, a float32 tensor T as `T`.
The file is written block by block. It stays in the cache folder, named by a digest of source and
recipe, so the same export is rounded only once.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gemma_export import shards
from gemma_export.cache_lock import InUse
from gemma_export.checkpoint import Checkpoint
from gemma_export.checkpoint.prequantized import Prequantized
from gemma_export.digest import digest_of
from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.codes import Codes, dequantize
from gemma_export.formats.format import FLOAT, Format
from gemma_export.formats.safetensors import SafetensorsFile, SafetensorsWriter
from gemma_export.model.config import TABLE, TABLE_FACTORS
from gemma_export.parallel import in_order
from gemma_export.progress import Note, Tick, silent, unheard
from gemma_export.quantize.recipe import Recipe, Rounding
from gemma_export.quantize.round import check_reach, round_rows
from gemma_runtime.cache import cache_folder
from gemma_runtime.contents.digests import combine_digests, parts_digest
from gemma_runtime.errors import CheckpointError
from gemma_runtime.formats.safetensors import TensorInfo
from gemma_runtime.staging import staged_file

_VERSION = "3"  # increase it when rounding or the layout of the file changes
_Hashes = Mapping[str, "hashlib._Hash"]  # name in the file → hash of the data


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight in the store, read a block of rows at a time."""

    name: str
    shape: tuple[int, ...]
    format: Format
    file: SafetensorsFile

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), dequantized to float32."""
        if self.format.is_float:
            return self.file.rows(self.name, start, stop)
        if self.format.int8_columns:
            return torch.cat([piece.rows(start, stop) for piece in self.pieces()], 1)
        return dequantize(self.codes(start, stop), self.format)

    @property
    def factors(self) -> Tensor | None:
        """(M,) by which the table's columns were multiplied; None without such factors."""
        if self.name != TABLE or TABLE_FACTORS not in self.file.tensors:
            return None
        return self.file.rows(TABLE_FACTORS, 0, self.shape[1])

    def pieces(self) -> list["StoredWeight"]:
        """The stored pieces of the matrix from left to right; usually one, itself."""
        rows, width = self.shape
        return [
            StoredWeight(name, (rows, len(range(width)[columns])), fmt, self.file)
            for name, (columns, fmt) in self.format.pieces(self.name, width).items()
        ]

    def codes(self, start: int, stop: int) -> Codes:
        return Codes(
            self.part("codes", start, stop),
            self.part("scales", start, stop),
            self.part("zeros", start, stop) if self.format.asymmetric else None,
        )

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of codes, scales or zeros."""
        return self.file.rows(f"{self.name}.{name}", start, stop)


@dataclass(frozen=True, slots=True)
class PassingWeight:
    """A weight that is rounded without text each time that rows of it are read."""

    name: str
    shape: tuple[int, ...]
    format: Format
    checkpoint: Checkpoint
    recipe: Recipe
    factors: None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) as the store will hold them, dequantized to float32."""
        parts = round_span(self.name, (start, stop), self.checkpoint, self.format, self.recipe)
        if self.format.is_float:
            return parts[self.name]
        codes = (parts.get(f"{self.name}.{part}") for part in Codes._fields)
        return dequantize(Codes(*codes), self.format)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class QuantizedStore:
    path: Path
    recipe: str
    codes_digest: str  # see `gemma_runtime.contents.digests`
    formats: Mapping[str, Format]
    file: SafetensorsFile
    shapes: Mapping[str, tuple[int, ...]]
    use: InUse  # keeps `gemma-export cache` from removing the file

    def weight(self, name: str) -> StoredWeight:
        return StoredWeight(name, self.shapes[name], self.formats.get(name, FLOAT), self.file)


class Rounded(Protocol):
    """Weights rounded in advance, using calibration data."""

    @property
    def key(self) -> str:
        """Part of the store's file name; differs if the codes may differ."""
        ...

    def round_all(self) -> None:
        """Round all weights, unless that is done already."""
        ...

    def parts(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        """Rows [start, stop) of a tensor's parts, by their names in the store."""
        ...


def open_or_build_store(
    checkpoint: Checkpoint,
    recipe: Recipe,
    progress: Tick | None = None,
    rounded: Rounded | None = None,
    note: Note = silent,
) -> QuantizedStore:
    """Open the store of this checkpoint and recipe; quantize if the cache doesn't contain it.

    A calibrated recipe needs `rounded`. The content of a cached store is verified; a damaged store
    is built again.
    """
    formats = recipe.formats(checkpoint.config)
    path = store_path(checkpoint, recipe, rounded)
    with shards.exclusive(path, f"quantizing {checkpoint.id} ({recipe.name})", note):
        use = InUse(path)
        if not shards.from_first(lambda: _is_built(path, formats, note)):
            if rounded is not None:
                rounded.round_all()
            tick = progress or unheard
            shards.from_first(lambda: _build(path, checkpoint, recipe, formats, tick, rounded))
        os.utime(path)  # `gemma-export cache` shows the time of the last use
    file, shapes = SafetensorsFile(path), checkpoint.config.tensor_shapes()
    digest = file.metadata["codes_digest"]
    return QuantizedStore(path, recipe.name, digest, formats, file, shapes, use)


def store_path(checkpoint: Checkpoint, recipe: Recipe, rounded: Rounded | None = None) -> Path:
    key = (_VERSION, checkpoint.digest(), recipe.rules, rounded.key if rounded else None)
    return cache_folder() / "stores" / f"{digest_of(key)[:32]}.safetensors"


def _is_built(path: Path, formats: Mapping[str, Format], note: Note) -> bool:
    """Whether the store is in the cache; deletes a damaged one."""
    if path.exists() and not _is_intact(path, formats):
        note(f"the cached store {path} is damaged; building it again")
        path.unlink()
    return path.exists()


def _is_intact(path: Path, formats: Mapping[str, Format]) -> bool:
    """Whether a store's content matches its digests. Reads the whole file."""
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return False
    hashes = dict(in_order(lambda name: (name, _hash(file, name)), file.tensors))
    content = _content_digest(hashes, file.tensors)
    return content == file.metadata.get("content_digest") and (
        _codes_digest(hashes, formats) == file.metadata.get("codes_digest")
    )


def _hash(file: SafetensorsFile, name: str) -> "hashlib._Hash":
    digest = hashlib.sha256()
    for span in row_blocks(file.tensors[name].shape):
        digest.update(_bytes(file.rows(name, *span)))
    return digest


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _build(
    path: Path,
    checkpoint: Checkpoint,
    recipe: Recipe,
    formats: Mapping[str, Format],
    progress: Tick,
    rounded: Rounded | None,
) -> None:
    shapes = checkpoint.config.tensor_shapes()
    layout: dict[str, TensorInfo] = {}
    for name, shape in shapes.items():
        layout |= _layout(name, shape, formats.get(name, FLOAT))
    if recipe.scales_table(checkpoint.config):
        layout[TABLE_FACTORS] = TensorInfo("F32", shapes[TABLE][1:])
    metadata = {
        "model": checkpoint.id,
        "recipe": recipe.name,
        "source": checkpoint.digest(),
        "codes_digest": "0" * 64,
        "content_digest": "0" * 64,
    }
    try:
        with (
            staged_file(path) as partial,
            SafetensorsWriter(partial, layout, metadata) as writer,
        ):
            hashes: dict[str, hashlib._Hash] = {}
            for name, shape in shapes.items():
                fmt = formats.get(name, FLOAT)
                hashes |= _write(writer, checkpoint, recipe, name, shape, fmt, progress, rounded)
            writer.patch_metadata("codes_digest", _codes_digest(hashes, formats))
            writer.patch_metadata("content_digest", _content_digest(hashes, layout))
    except OSError as error:
        raise CheckpointError(f"can't write the store {path}: {error.strerror}") from error


def _codes_digest(hashes: _Hashes, formats: Mapping[str, Format]) -> str:
    """Digest of the quantized weights, computable from any container; of all if none is."""
    pieces = [
        (piece, own, [f"{piece}.{part}" for part in Codes._fields])
        for name, fmt in formats.items()
        if not fmt.is_float
        for piece, (_, own) in fmt.pieces(name, 0).items()  # any width gives these
    ]
    return combine_digests(
        f"{piece} {own} {parts_digest(hashes[part] for part in parts if part in hashes)}"
        for piece, own, parts in pieces or [(name, FLOAT, [name]) for name in hashes]
    )


def _content_digest(hashes: _Hashes, layout: Mapping[str, TensorInfo]) -> str:
    """Digest of everything in the file."""
    return combine_digests(
        f"{name} {info.dtype} {list(info.shape)} {hashes[name].hexdigest()}"
        for name, info in layout.items()
    )


def _layout(name: str, shape: tuple[int, ...], fmt: Format) -> dict[str, TensorInfo]:
    if fmt.is_float:
        return {name: TensorInfo("F32", shape)}
    return {
        f"{piece}.{part}": info
        for piece, (columns, own) in fmt.pieces(name, shape[1]).items()
        for part, info in parts_layout((shape[0], len(range(shape[1])[columns])), own).items()
    }


def parts_layout(shape: tuple[int, ...], fmt: Format) -> dict[str, TensorInfo]:
    """Types and shapes of the parts of a quantized matrix."""
    rows, width = shape
    groups = width // fmt.group
    layout = {
        "codes": TensorInfo("U8", (rows, width * fmt.bits // 8)),
        "scales": TensorInfo("F16", (rows, groups)),
    }
    if fmt.asymmetric:
        layout["zeros"] = TensorInfo("U8", (rows, (groups * fmt.bits + 7) // 8))
    return layout


def _write(
    writer: SafetensorsWriter,
    checkpoint: Checkpoint,
    recipe: Recipe,
    name: str,
    shape: tuple[int, ...],
    fmt: Format,
    progress: Tick,
    rounded: Rounded | None,
) -> dict[str, "hashlib._Hash"]:
    """Write one tensor; returns the hashes of its parts."""

    def quantize(span: tuple[int, int]) -> tuple[int, int, dict[str, Tensor]]:
        elements = (span[1] - span[0]) * math.prod(shape[1:])
        if rounded is not None:
            return span[0], elements * 4, rounded.parts(name, *span)
        return span[0], elements * 4, round_span(name, span, checkpoint, fmt, recipe)

    hashes: dict[str, hashlib._Hash] = {}
    for start, done, parts in in_order(quantize, row_blocks(shape)):
        for part, tensor in parts.items():
            data = tensor.contiguous().flatten().view(torch.uint8).numpy()
            hashes.setdefault(part, hashlib.sha256()).update(data.data)
            writer.write_rows(part, start, data)
        progress(name, done)
    return hashes


def round_span(
    name: str, span: tuple[int, int], checkpoint: Checkpoint, fmt: Format, recipe: Recipe
) -> dict[str, Tensor]:
    """Round rows [start, stop) of a tensor without text; returns their parts by their names."""
    if fmt.is_float:
        return {name: checkpoint.rows(name, *span)}
    rounding = recipe.rule(name).rounding
    if rounding == "kept":
        assert isinstance(checkpoint, Prequantized)  # `resolve_recipe` made sure
        block = checkpoint.codes(name, *span)
        return named_parts(name, block)
    return round_pieces(name, checkpoint.rows(name, *span), fmt, rounding)


def round_pieces(name: str, rows: Tensor, fmt: Format, rounding: Rounding) -> dict[str, Tensor]:
    """Round rows of a matrix; returns their parts by their names in the file."""
    parts: dict[str, Tensor] = {}
    for piece, (columns, own) in fmt.pieces(name, rows.shape[1]).items():
        check_reach(piece, rows[:, columns], own)
        parts |= named_parts(piece, round_rows(rows[:, columns], own, rounding))
    return parts


def named_parts(name: str, block: Codes) -> dict[str, Tensor]:
    """The parts of a matrix by their names in the file."""
    return {f"{name}.{part}": rows for part, rows in block.parts().items()}
