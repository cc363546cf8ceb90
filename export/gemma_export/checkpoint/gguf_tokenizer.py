"""Rebuilds `tokenizer.json` from GGUF metadata. It gives the same ids as the original.

GGUF stores SentencePiece's pieces with scores; `tokenizer.json` needs an ordered list of merges.
Their order is that of transformers' `convert_slow_tokenizer.generate_merges`, ties included. For
Gemma 2 and 3 this gives exactly the original list.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from gemma_export.checkpoint.gguf_config import TOKENS
from gemma_export.checkpoint.piece_tokenizer import (
    NORMAL,
    SPACE,
    USER_DEFINED,
    splits_of,
    tokenizer_json,
)
from gemma_runtime.errors import CheckpointError
from gemma_runtime.formats.gguf import Value

# The documentation's tables.
METADATA: Mapping[str, str] = {
    "`tokenizer.ggml.*` in a GGUF file": "rebuilt as `tokenizer.json`, with the same ids",
}
REFUSED: Mapping[str, str] = {
    "GGUF vocabularies other than SentencePiece's (`tokenizer.ggml.model`)": "no Gemma has one; "
    "convert the model again",
}


def rebuild_tokenizer(where: Path, metadata: Mapping[str, Value]) -> bytes:
    """The bytes of a `tokenizer.json`. Raises CheckpointError if the vocabulary is incomplete.

    Only <image_soft_token> is missing, because GGUF leaves out tokens that the text model lacks.
    """
    stored, scores, types = _vocabulary(where, metadata)
    tokens = [
        # llama.cpp stores runs of U+2581 as runs of spaces.
        SPACE * len(token) if kind == USER_DEFINED and not token.strip(" ") else token
        for token, kind in zip(stored, types, strict=True)
    ]
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise CheckpointError(
            f"{where}: the vocabulary has duplicate tokens; convert the model again"
        )
    bos, unknown = (_named(where, metadata, name, tokens) for name in ("bos", "unknown"))
    merges = _merges(tokens, ids, scores, types)
    return tokenizer_json(tokens, types, merges, bos, unknown)


def _vocabulary(
    where: Path, metadata: Mapping[str, Value]
) -> tuple[list[str], list[float], list[int]]:
    """The tokens, scores and types in the metadata."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "llama":
        raise CheckpointError(
            f"{where}: tokenizer.ggml.model is {kind!r:.40}, expected 'llama' (SentencePiece); "
            "convert the model again from a folder with its tokenizer.model"
        )
    tokens, scores, types = (
        metadata.get(key) for key in (TOKENS, "tokenizer.ggml.scores", "tokenizer.ggml.token_type")
    )
    if not (
        isinstance(tokens, list)
        and isinstance(scores, np.ndarray)
        and isinstance(types, np.ndarray)
        and len(tokens) == len(scores) == len(types)
    ):
        raise CheckpointError(
            f"{where}: expected a score and a type for every token of the vocabulary; convert the "
            "model again"
        )
    return tokens, scores.tolist(), types.tolist()


def _named(where: Path, metadata: Mapping[str, Value], name: str, tokens: Sequence[str]) -> str:
    key = f"tokenizer.ggml.{name}_token_id"
    index = metadata.get(key)
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise CheckpointError(
            f"{where}: {key} is {index!r:.40}, expected one of {len(tokens)} tokens"
        )
    return tokens[index]


def _merges(
    tokens: Sequence[str], ids: Mapping[str, int], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Every split of a token into two tokens, best first.

    Splits are ordered by the token's score, then the longer left half, then the longer right half,
    then the lower ids. User-defined tokens have the highest score in SentencePiece, 0; GGUF stores
    -1000.
    """
    score_of = {
        index: 0.0 if kind == USER_DEFINED else score
        for index, (score, kind) in enumerate(zip(scores, types, strict=True))
        if kind in (NORMAL, USER_DEFINED)
    }
    merges: list[tuple[str, str]] = []
    for _, equals in groupby(
        sorted(score_of, key=lambda index: -score_of[index]), score_of.__getitem__
    ):
        splits = [split for index in equals for split in splits_of(tokens, ids, index)]
        merges += sorted(splits, key=lambda split: (-len(split[0]), -len(split[1])))
    return merges
