"""Reads Hugging Face folders: `config.json` and safetensors, in one file or sharded."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from gemma_export.checkpoint import TokenizerFiles, check_finite, check_tensors, our_values
from gemma_export.checkpoint.generation import GenerationDefaults, generation_from_hf
from gemma_export.checkpoint.grid import grid_codes
from gemma_export.checkpoint.packed import FLOATS, PackedMatrix, Place, Places
from gemma_export.checkpoint.packed_folder import find_quantization, split_packed
from gemma_export.checkpoint.prequantized import Stored, grid_stored
from gemma_export.checkpoint.sentence_folder import EncoderFiles, read_encoder
from gemma_export.checkpoint.text_names import check_unpacked, find_text
from gemma_export.checkpoint.tokenizer_folder import read_tokenizer
from gemma_export.checkpoint.weight_files import CONFIG, check_folder, open_weights
from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.codes import Codes
from gemma_export.formats.json_file import read_json
from gemma_export.model.config import HEAD, TABLE, GemmaConfig, dense_layer
from gemma_export.model.hf_config import config_from_hf, is_multimodal
from gemma_runtime.bundle import sha256_file
from gemma_runtime.errors import CheckpointError, ConfigError

_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class FolderCheckpoint:
    id: str
    revision: str | None
    folder: Path
    config: GemmaConfig
    notes: tuple[str, ...]
    _places: Mapping[str, Place] = field(repr=False)  # our name → file, stored name
    _files: frozenset[Path] = field(repr=False)
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    _packed: Mapping[str, PackedMatrix] = field(
        default_factory=dict, repr=False
    )  # see packed_folder.READERS
    encoder: EncoderFiles | None = None  # how a vector is made; None if it is a decoder
    # What is known of float matrices: finding out may read them whole.
    _floats: dict[str, Stored] = field(default_factory=dict, repr=False, compare=False)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._packed:
            values = self._packed[name].rows(start, stop)
            check_finite(self.folder, name, values)
            return values
        file, stored = self._places[name]
        values = file.rows(stored, start, stop).float()
        check_finite(file.path, stored, values)
        return our_values(self.config, name, values)

    def stored(self, name: str) -> Stored:
        """How a matrix is stored: packed, as floats on the Q4_0 grid, or as other floats.

        Quantization-aware training leaves floats on the Q4_0 grid.
        """
        if name in self._packed:
            return self._packed[name].stored()
        if name not in self._floats:
            dtype = self._dtype(name)
            kind = str(dtype).removeprefix("torch.")
            self._floats[name] = grid_stored(self, name, kind, dtype)
        return self._floats[name]

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
    check_folder(folder)
    hf_config = read_json(folder / CONFIG)
    with _naming(folder):
        quantization = find_quantization(folder, hf_config)
        config = config_from_hf(hf_config)
    generation = _generation(folder)
    files, aside = open_weights(folder, hf_config)
    with _naming(folder):
        text = find_text(files, {config.hf_name(name): name for name in config.tensor_shapes()})
        places = {name: (files[stored], stored) for name, stored in text.stored.items()}
        plain, packed, notes = split_packed(places, quantization)
        plain, others = _needed(plain, config.tensor_shapes())
        check_unpacked(others)
        plain, config, head_note = _settle_head(plain, packed, config)
    encoder = read_encoder(folder) if config.is_encoder else None
    if encoder is not None:
        first, config = len(config.dense), replace(config, dense=config.dense + encoder.widths)
        plain |= {dense_layer(first + i): place for i, place in enumerate(encoder.places)}
    _check_floats(folder, plain)
    shapes = {name: file.tensors[stored].shape for name, (file, stored) in plain.items()}
    shapes |= {name: matrix.shape for name, matrix in packed.items()}
    check_tensors(folder, shapes, config.tensor_shapes())
    used = frozenset(file.path for file, _ in (*places.values(), *plain.values()))
    if quantization is not None and quantization.file is not None:
        used |= {quantization.file}
    multimodal = _multimodal_note(folder, text.towers) if is_multimodal(hf_config) else ()
    notes = (
        *aside,
        *notes,
        *head_note,
        *multimodal,
        *_others_note(folder, (*text.others, *others)),
    )
    return FolderCheckpoint(
        id or folder.name, revision, folder, config, notes, plain, used, generation, packed, encoder
    )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{path}: {error}") from error


def _needed(
    places: Places, expected: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Place], tuple[str, ...]]:
    """The model's tensors with a stored head, and the stored names of all others."""
    needed = {n: place for n, place in places.items() if n in expected or n == HEAD}
    return needed, tuple(stored for name, (_, stored) in places.items() if name not in needed)


def _settle_head(
    plain: Mapping[str, Place], packed: Mapping[str, PackedMatrix], config: GemmaConfig
) -> tuple[dict[str, Place], GemmaConfig, tuple[str, ...]]:
    """The tensors to read, and whether the head is the table, as transformers decides it.

    A stored head that equals the table is the table. One that differs is a head of its own,
    whatever the config says. A head without a table is both, if the config ties them.
    """
    left = dict(plain)
    if HEAD not in left and HEAD not in packed:
        if not config.tied:
            raise CheckpointError(
                f"config.json says that tie_word_embeddings is False, but {HEAD} is missing; "
                "expected the head's weights, or true if the head is the embedding table"
            )
        return left, config, ()
    if HEAD in packed and config.tied:
        raise CheckpointError(
            f"{HEAD} is quantized, but config.json says that the head is {TABLE}; expected "
            "tie_word_embeddings false, or no quantized head"
        )
    if HEAD in left and config.tied and TABLE not in left and TABLE not in packed:
        left[TABLE] = left.pop(HEAD)
        return left, config, ()
    if HEAD in left and TABLE in left and _equal(left[HEAD], left[TABLE]):
        del left[HEAD]
        return left, replace(config, tied=True), ()
    if not config.tied:
        return left, config, ()
    note = (
        f"{HEAD} differs from {TABLE}, so the model has a head of its own, although config.json "
        "ties them: transformers loads it so too"
    )
    return left, replace(config, tied=False), (note,)


def _check_floats(folder: Path, places: Mapping[str, Place]) -> None:
    for name, (file, stored) in places.items():
        if (dtype := file.tensors[stored].dtype) not in FLOATS:
            raise CheckpointError(
                f"{folder}: tensor {name} is {dtype}, expected one of {', '.join(FLOATS)}; give "
                "the original checkpoint"
            )


def _equal(head: Place, table: Place) -> bool:
    """Whether two tensors hold the same numbers."""
    (head_file, head_name), (table_file, table_name) = head, table
    info, other = head_file.tensors[head_name], table_file.tensors[table_name]
    return (
        info.shape == other.shape
        and {info.dtype, other.dtype} <= set(FLOATS)
        and all(
            torch.equal(
                head_file.rows(head_name, *span).float(),
                table_file.rows(table_name, *span).float(),
            )
            for span in row_blocks(info.shape)
        )
    )


def _multimodal_note(folder: Path, towers: int) -> tuple[str, ...]:
    without = f", without its {_counted(towers, 'tensor')} for images or sound" if towers else ""
    return (f"{folder.name} is multimodal: only its text model is exported{without}",)


def _others_note(folder: Path, others: tuple[str, ...]) -> tuple[str, ...]:
    if not others:
        return ()
    more = f", e.g. {min(others)}" if len(others) > 1 else f": {others[0]}"
    return (
        f"{folder.name} has {_counted(len(others), 'tensor')} that a causal Gemma does not use, "
        f"left out{more}",
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _generation(folder: Path) -> GenerationDefaults:
    path = folder / _GENERATION
    if not path.exists():
        return GenerationDefaults()
    content = read_json(path)
    with _naming(path):
        return generation_from_hf(content)
