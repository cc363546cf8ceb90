"""Calibration text, whose activations decide how weights are rounded.

The default text needs no network. It consists of `calibration.txt` in this folder and of sources of
the running Python's standard library. `calibration.txt` contains parts of the Universal Declaration
of Human Rights in 75 languages, and prose, dialogue, instructions, contracts and code written for
this project, in 14 languages. The 75 are none of those in `benchmarks/text.txt`, but some of those
that `benchmarks/language_texts.py` collects: Bengali, Hebrew, Thai, Ukrainian and others.
"""

import hashlib
import importlib
import inspect
import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from gemma_export.model.config import GemmaConfig
from gemma_runtime.errors import RecipeError

LENGTH = 256  # tokens of a sequence, including bos
_SEED = 0
_MOST = 1024  # most sequences
_RANDOM = 8  # sequences for a model without a tokenizer
_TOKEN_BYTES = 4.3  # of UTF-8 in a token: the default text's 871,065 bytes with Gemma 3's tokenizer
_PIECE = 3000  # characters per piece of a source file
_LONGEST = 12_000  # most characters of one module
_MODULES = (
    "textwrap",
    "statistics",
    "heapq",
    "json.decoder",
    "random",
    "csv",
    "configparser",
    "fractions",
    "difflib",
    "shlex",
    "functools",
    "contextlib",
    "pydoc_data.topics",  # the language reference, in prose
)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Shuffled sequences that each start with bos."""

    source: str  # "default", a file or a folder
    tokens: Tensor  # (B, T) int64
    seed: int = _SEED

    def first(self, sequences: int) -> "Calibration":
        return replace(self, tokens=self.tokens[:sequences])

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.tokens.to(torch.int32).numpy().tobytes()).hexdigest()


def load_calibration(
    config: GemmaConfig, encoder: Tokenizer | None, path: Path | None = None
) -> Calibration:
    """Encode the default text, a file, or a folder's `*.txt`, `*.md` and `*.py` files.

    Returns random ids without a tokenizer. Raises RecipeError for missing or too short text.
    """
    if encoder is None:
        draw = np.random.default_rng(_SEED).integers(0, config.vocab_size, (_RANDOM, LENGTH))
        return Calibration("random", torch.from_numpy(draw))
    texts = default_texts() if path is None else _read_texts(path)
    random.Random(_SEED).shuffle(texts)
    ids: list[int] = []
    for text in texts:
        ids += encoder.encode(text + "\n\n", add_special_tokens=False).ids
    rows = min(_MOST, len(ids) // (LENGTH - 1))
    if rows == 0:
        raise RecipeError(
            f"calibration text {path or 'default'} has {len(ids)} tokens, expected at least "
            f"{LENGTH}, better tens of thousands"
        )
    body = torch.tensor(ids[: rows * (LENGTH - 1)]).view(rows, LENGTH - 1)
    bos = torch.full((rows, 1), config.bos_token)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(_SEED))
    return Calibration(str(path or "default"), torch.cat((bos, body), 1)[order])


def expected_sequences(path: Path | None, *, has_text: bool) -> int:
    """About how many sequences `load_calibration` will give, told without a tokenizer.

    `has_text` says whether the model has one.
    """
    if not has_text:
        return _RANDOM
    texts = default_texts() if path is None else _read_texts(path)
    tokens = sum(len(text.encode()) for text in texts) / _TOKEN_BYTES
    return min(_MOST, max(1, int(tokens) // (LENGTH - 1)))


def default_texts() -> list[str]:
    own = Path(__file__).with_name("calibration.txt").read_text("utf-8")
    return [*_paragraphs(own), *(piece for name in _MODULES for piece in _source_pieces(name))]


def _source_pieces(module: str) -> list[str]:
    try:
        source = inspect.getsource(importlib.import_module(module))[:_LONGEST]
    except (ImportError, OSError) as error:
        raise RecipeError(
            f"this Python lacks the source of module {module}, a part of the default calibration "
            "text; give --calibration FILE"
        ) from error
    return [source[i : i + _PIECE] for i in range(0, len(source), _PIECE)]


def _read_texts(path: Path) -> list[str]:
    suffixes = (".txt", ".md", ".py")
    files = sorted(p for p in path.rglob("*") if p.suffix in suffixes) if path.is_dir() else [path]
    try:
        return [text for file in files for text in _paragraphs(file.read_text("utf-8"))]
    except OSError as error:
        raise RecipeError(f"can't read calibration text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"calibration text {path} is not UTF-8: {error.reason}") from error


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n\n") if part.strip()]
