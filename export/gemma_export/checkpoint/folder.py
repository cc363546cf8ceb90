"""Reads Hugging Face folders: `config.json` and safetensors, in one file or sharded."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_export.checkpoint import TokenizerFiles, check_finite, check_tensors
from gemma_export.checkpoint.generation import GenerationDefaults, generation_from_hf
from gemma_export.checkpoint.grid import grid_codes
from gemma_export.checkpoint.packed import PackedMatrix, Places
from gemma_export.checkpoint.packed_folder import check_method, split_packed
from gemma_export.checkpoint.prequantized import Stored, grid_stored
from gemma_export.checkpoint.tokenizer_folder import read_tokenizer
from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.codes import Codes
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.model.config import TABLE, GemmaConfig, config_from_hf, is_multimodal
from gemma_runtime.bundle import sha256_file
from gemma_runtime.errors import CheckpointError, ConfigError

_INDEX = "model.safetensors.index.json"
_GENERATION = "generation_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# In multimodal Gemma 3 the text model's tensors have one of these prefixes.
_TEXT_PREFIXES = ("language_model.model.", "model.language_model.")
_VISION_PREFIXES = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")


@dataclass(frozen=True)
class FolderCheckpoint:
    id: str
    revision: str | None
    folder: Path
    config: GemmaConfig
    notes: tuple[str, ...]
    _places: Mapping[str, tuple[SafetensorsFile, str]] = field(
        repr=False
    )  # our name → file, stored name
    _files: frozenset[Path] = field(repr=False)
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    _packed: Mapping[str, PackedMatrix] = field(
        default_factory=dict, repr=False
    )  # GPTQ, AWQ, bitsandbytes

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._packed:
            values = self._packed[name].rows(start, stop)
            check_finite(self.folder, name, values)
            return values
        file, stored = self._places[name]
        values = file.rows(stored, start, stop).float()
        check_finite(file.path, stored, values)
        return values

    def stored(self, name: str) -> Stored:
        """How a matrix is stored: packed, as floats on the Q4_0 grid, or as other floats.

        Quantization-aware training leaves floats on the Q4_0 grid.
        """
        if name in self._packed:
            return self._packed[name].stored()
        dtype = self._dtype(name)
        return grid_stored(self, name, str(dtype).removeprefix("torch."), dtype)

    def codes(self, name: str, start: int, stop: int) -> Codes:
        if name in self._packed:
            return self._packed[name].codes(start, stop)
        codes = grid_codes(self.rows(name, start, stop), self._dtype(name))
        assert codes is not None, name  # `stored` has checked it
        return codes

    def _dtype(self, name: str) -> torch.dtype:
        file, stored = self._places[name]
        return file.dtype(stored)

    def digest(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        parts = [self.folder / "config.json", *sorted(self._files)]
        return hashlib.sha256(" ".join(sha256_file(path) for path in parts).encode()).hexdigest()

    def tokenizer(self) -> TokenizerFiles | None:
        return read_tokenizer(self.folder, self.config.vocab_size)


def open_folder(
    folder: Path, id: str | None = None, revision: str | None = None
) -> FolderCheckpoint:
    """Open a checkpoint folder and check every tensor's name and shape, without reading weights.

    Raises CheckpointError or ConfigError, e.g. for pickled weights, unsupported quantization,
    adapters and missing shards.
    """
    hf_config = _read_json(folder / "config.json")
    with _naming(folder):
        check_method(hf_config)
    config = config_from_hf(hf_config)
    generation = _generation(folder)
    places, left_out = _text_places(_open_files(folder), is_multimodal(hf_config))
    files = frozenset(file.path for file, _ in places.values())
    with _naming(folder):
        plain, packed, notes = split_packed(places, hf_config)
    _check_floats(folder, plain)
    shapes = {name: file.tensors[stored].shape for name, (file, stored) in plain.items()}
    shapes |= {name: matrix.shape for name, matrix in packed.items()}
    check_tensors(folder, shapes, config.tensor_shapes())
    notes += (
        (f"{folder.name} is multimodal: only its text model is exported, without its "
         f"{left_out} vision tensors",)
        if is_multimodal(hf_config)
        else ()
    )  # fmt: skip
    return FolderCheckpoint(
        id or folder.name, revision, folder, config, notes, plain, files, generation, packed
    )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _check_floats(folder: Path, places: Places) -> None:
    for name, (file, stored) in places.items():
        if not file.dtype(stored).is_floating_point:
            raise CheckpointError(
                f"{folder}: tensor {name} is {file.tensors[stored].dtype}, expected one of F32, "
                "F16, BF16"
            )


def _open_files(folder: Path) -> dict[str, SafetensorsFile]:
    """Every tensor's stored name → its file."""
    if not (folder / _INDEX).exists():
        files = [SafetensorsFile(path) for path in sorted(folder.glob("*.safetensors"))]
        if not files:
            raise CheckpointError(_why_empty(folder))
        return {name: file for file in files for name in file.tensors}
    index = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{folder / _INDEX} has no weight_map; download the folder again")
    opened = {shard: _open_shard(folder, shard) for shard in sorted(set(map(str, index.values())))}
    for name, shard in index.items():
        if name not in opened[str(shard)].tensors:
            raise CheckpointError(
                f"{folder}: {_INDEX} lists {name} in {shard}, which doesn't have it"
            )
    unlisted = {n for file in opened.values() for n in file.tensors} - set(index)
    if unlisted:
        raise CheckpointError(f"{folder}: tensor {sorted(unlisted)[0]} is missing from {_INDEX}")
    return {name: opened[str(shard)] for name, shard in index.items()}


def _open_shard(folder: Path, shard: str) -> SafetensorsFile:
    if Path(shard).name != shard or shard in ("", ".", ".."):
        raise CheckpointError(f"{folder}: {_INDEX} names {shard!r}, outside the folder")
    if not shard.endswith(".safetensors"):
        raise CheckpointError(
            f"{folder}: {_INDEX} names {shard!r}, which is not a safetensors file"
        )
    if not (folder / shard).is_file():
        raise CheckpointError(f"{folder}: shard {shard} is missing; download it")
    return SafetensorsFile(folder / shard)


def _why_empty(folder: Path) -> str:
    if any(path for pattern in _PICKLES for path in folder.glob(pattern)):
        return (
            f"{folder} contains pickled weights (.bin, .pt), which can run code when read; save "
            "the model again as safetensors"
        )
    return f"{folder} has no .safetensors file; expected a Hugging Face checkpoint folder"


def _text_places(
    files: Mapping[str, SafetensorsFile], multimodal: bool
) -> tuple[dict[str, tuple[SafetensorsFile, str]], int]:
    """Our names → (file, stored name), and the number of vision tensors left out."""
    places: dict[str, tuple[SafetensorsFile, str]] = {}
    left_out = 0
    for stored, file in files.items():
        if multimodal and stored.startswith(_VISION_PREFIXES):
            left_out += 1
        elif stored not in _HEADS:
            places[_text_name(stored) if multimodal else stored] = (file, stored)
    for head in set(_HEADS) & set(files):
        if TABLE in places:
            _check_tied(files[head], head, *places[TABLE])
    return places, left_out


def _text_name(stored: str) -> str:
    for prefix in _TEXT_PREFIXES:
        if stored.startswith(prefix):
            return "model." + stored.removeprefix(prefix)
    return stored


def _check_tied(file: SafetensorsFile, head: str, table_file: SafetensorsFile, table: str) -> None:
    """Raise CheckpointError unless a stored head equals the embedding table."""
    shape = file.tensors[head].shape
    tied = shape == table_file.tensors[table].shape and all(
        torch.equal(file.rows(head, *span), table_file.rows(table, *span))
        for span in row_blocks(shape)
    )
    if not tied:
        raise CheckpointError(
            f"{file.path}: {head} differs from {table}; Gemma's head is its embedding table, and "
            "an untied head is not supported"
        )


def _generation(folder: Path) -> GenerationDefaults:
    path = folder / _GENERATION
    if not path.exists():
        return GenerationDefaults()
    with _naming(path):
        return generation_from_hf(_read_json(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content
