"""Reads GGUF files of Gemma 1 to 4, as written by llama.cpp and Ollama, also in parts."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemma_export.checkpoint import TokenizerFiles, check_finite, check_tensors
from gemma_export.checkpoint.generation import GenerationDefaults, generation_from_gguf
from gemma_export.checkpoint.gguf_codes import STORED, blocks_to_codes
from gemma_export.checkpoint.gguf_config import TOKENS, config_from_gguf
from gemma_export.checkpoint.gguf_layers import ROPE_FACTORS, unused_tensors
from gemma_export.checkpoint.gguf_tokenizer import rebuild_tokenizer
from gemma_export.checkpoint.grid import grid_codes
from gemma_export.checkpoint.prequantized import Stored, grid_stored
from gemma_export.formats.blocks import row_blocks
from gemma_export.formats.codes import Codes
from gemma_export.formats.gguf_file import read_blocks, read_header, read_rows
from gemma_export.formats.gguf_parts import GgufModel, read_model
from gemma_export.model.config import HEAD, TABLE, GemmaConfig, is_gain
from gemma_runtime.bundle import sha256_file
from gemma_runtime.contents.gguf_names import hf_name
from gemma_runtime.errors import ConfigError
from gemma_runtime.formats.gguf import GgufTensor

# Tensors for images and sound in Ollama's files; llama.cpp has a file of their own for them.
_TOWERS = ("v.", "a.", "mm.")
# The documentation's tables.
TEMPLATES: Mapping[str, str] = {"`tokenizer.chat_template` in a GGUF file": "as it is"}
REFUSED: Mapping[str, str] = {
    "GGUF models with a missing part": "download all parts",
}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GgufCheckpoint:
    id: str
    path: Path
    config: GemmaConfig
    notes: tuple[str, ...]
    _tensors: Mapping[str, GgufTensor] = field(repr=False)  # by Hugging Face name
    _files: Mapping[str, Path] = field(repr=False)  # by Hugging Face name
    revision: str | None = None
    generation: GenerationDefaults = field(default_factory=GenerationDefaults)
    # What is known of float matrices: finding out may read them whole.
    _floats: dict[str, Stored] = field(default_factory=dict, repr=False, compare=False)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self._tensors[name]
        path = self._files[name]
        values = torch.from_numpy(read_rows(path, tensor, start, stop))
        check_finite(path, name, values)
        # Of norms, GGUF stores what they multiply by, and `rows` gives that - 1: see `our_values`.
        return values - 1 if is_gain(name) else values

    def stored(self, name: str) -> Stored:
        """How a matrix is stored. Reads a float matrix to test whether it is on the Q4_0 grid."""
        kind = self._tensors[name].type
        if kind.name not in _FLOATS:
            return STORED.get(kind, Stored(kind.name))
        if name not in self._floats:
            self._floats[name] = grid_stored(self, name, kind.name, _FLOATS[kind.name])
        return self._floats[name]

    def codes(self, name: str, start: int, stop: int) -> Codes:
        tensor = self._tensors[name]
        if tensor.type not in STORED:
            on_grid = grid_codes(self.rows(name, start, stop), _FLOATS[tensor.type.name])
            assert on_grid is not None, name  # `stored` has checked it
            return on_grid
        path = self._files[name]
        codes = blocks_to_codes(read_blocks(path, tensor, start, stop), tensor.type)
        check_finite(path, name, codes.scales)
        return codes

    def digest(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digests = [sha256_file(path) for path in dict.fromkeys((self.path, *self._files.values()))]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def tokenizer(self) -> TokenizerFiles | None:
        """Rebuild `tokenizer.json`. Reads the vocabulary again instead of keeping it in memory."""
        metadata = read_header(self.path).metadata
        if TOKENS not in metadata:
            return None
        template = metadata.get("tokenizer.chat_template")
        rebuilt = rebuild_tokenizer(self.path, metadata)
        tokens, eos = metadata[TOKENS], metadata.get("tokenizer.ggml.eos_token_id")
        assert isinstance(tokens, list)  # else it can't be rebuilt
        return TokenizerFiles(
            rebuilt,
            template if isinstance(template, str) else None,
            tokens[eos] if isinstance(eos, int) and 0 <= eos < len(tokens) else "<eos>",
        )


def open_gguf(path: Path, notes: tuple[str, ...] = ()) -> GgufCheckpoint:
    """Open a `.gguf` file and check every tensor's name and shape, without reading weights.

    `notes` are additional notes for the user. Raises CheckpointError or ConfigError, e.g. for
    damaged files, missing parts, other models, unsupported block formats.
    """
    model = read_model(path)
    header = model.header
    try:
        config = config_from_gguf(header, _rope_factors(model))
        generation = generation_from_gguf(header.metadata)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    unused = unused_tensors(config)
    stored = [n for n in header.tensors if not n.startswith(_TOWERS) and n not in unused]
    tensors = {hf_name(name): header.tensors[name] for name in stored}
    files = {hf_name(name): model.files[name] for name in stored}
    if HEAD in tensors and _equal(tensors, files):
        del tensors[HEAD], files[HEAD]
    config = replace(config, tied=HEAD not in tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_tensors(path, shapes, config.tensor_shapes())
    notes = _notes(path, model, tensors) + notes
    return GgufCheckpoint(
        path.name, model.paths[0], config, notes, tensors, files, generation=generation
    )


def _rope_factors(model: GgufModel) -> NDArray[np.float32] | None:
    """The factors of global layers' rope, (D / 2,), where the file has them."""
    tensor = model.header.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    return read_rows(model.files[ROPE_FACTORS], tensor, 0, tensor.shape[0])


def _equal(tensors: Mapping[str, GgufTensor], files: Mapping[str, Path]) -> bool:
    """Whether a stored head has the bytes of the table."""
    head, table = tensors[HEAD], tensors[TABLE]
    return (head.type, head.shape) == (table.type, table.shape) and all(
        np.array_equal(
            read_blocks(files[HEAD], head, *span), read_blocks(files[TABLE], table, *span)
        )
        for span in row_blocks(head.shape)
    )


def _notes(path: Path, model: GgufModel, tensors: Mapping[str, GgufTensor]) -> tuple[str, ...]:
    notes: tuple[str, ...] = ()
    types = Counter(tensor.type.name for tensor in tensors.values())
    if quantized := [name for name, _ in types.most_common() if name not in _FLOATS]:
        notes += (
            f"{path.name} is already quantized ({', '.join(quantized)}): the export is compared "
            "with its values, not with those of the original model",
        )
    if left_out := sum(name.startswith(_TOWERS) for name in model.files):
        notes += (
            f"{path.name} is multimodal: only its text model is exported, without its {left_out} "
            "vision tensors",
        )
    return notes
