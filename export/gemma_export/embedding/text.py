"""Encodes what an encoder's bundle needs of texts: what is put around them, and the goldens."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from gemma_export.checkpoint import Checkpoint, TokenizerFiles
from gemma_export.checkpoint.sentence_folder import EncoderFiles
from gemma_export.model.config import GemmaConfig
from gemma_export.sidecars.prompts import LONG, PROMPTS, long_text
from gemma_export.sidecars.text import load_encoder, without_training_state
from gemma_runtime.errors import CheckpointError

_RANDOM_LENGTH = 32  # tokens of a golden without a tokenizer


@dataclass(frozen=True, slots=True)
class EncoderText:
    files: TokenizerFiles | None  # None for random weights
    before: tuple[int, ...]  # tokens before every text
    after: tuple[int, ...]
    goldens: Mapping[str, list[int]]  # token ids by name


def read_encoder_text(
    checkpoint: Checkpoint, encoder: EncoderFiles | None, context: int
) -> EncoderText:
    """Raises CheckpointError for a tokenizer that puts more around a text than bos and eos."""
    config, files = checkpoint.config, without_training_state(checkpoint.tokenizer())
    lengths = {LONG: long_length(config, context)}
    if files is None:
        draw = np.random.default_rng(0)
        lengths |= dict.fromkeys(PROMPTS, min(_RANDOM_LENGTH, context))
        drawn = {n: draw.integers(0, config.vocab_size, size) for n, size in lengths.items()}
        return EncoderText(None, (), (), {name: ids.tolist() for name, ids in drawn.items()})
    tokenizer = load_encoder(checkpoint, files)
    before, after = _around(checkpoint, tokenizer)
    beginnings = _beginnings(encoder)
    texts = {**PROMPTS, LONG: long_text()}
    goldens = {}
    for index, (name, text) in enumerate(texts.items()):
        ids = _ids(tokenizer, beginnings[index % len(beginnings)] + text)
        room = lengths.get(name, context) - len(before) - len(after)
        goldens[name] = [*before, *ids[:room], *after]
    return EncoderText(files, before, after, goldens)


def long_length(config: GemmaConfig, context: int) -> int:
    """The length of a golden whose first and last tokens lie beyond each other's windows."""
    return min(context, 2 * config.sliding_window + _RANDOM_LENGTH)


def _beginnings(encoder: EncoderFiles | None) -> list[str]:
    """Beginnings of texts as the model knows them, for the goldens in turns."""
    prompts = encoder.prompts if encoder is not None else {}
    return list(dict.fromkeys(prompts.values())) or [""]


def _around(
    checkpoint: Checkpoint, tokenizer: Tokenizer
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens before and behind every text.

    transformers takes them from `tokenizer.json` too, whatever the flags add_bos_token and
    add_eos_token of other files say.
    """
    ids, probe = tokenizer.encode("a").ids, _ids(tokenizer, "a")
    start = next((i for i in range(len(ids)) if ids[i : i + len(probe)] == probe), None)
    if start is None:
        raise CheckpointError(
            f"{checkpoint.id}: tokenizer.json changes a text when it adds its special tokens; "
            "expected tokens before and behind it"
        )
    return tuple(ids[:start]), tuple(ids[start + len(probe) :])


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
