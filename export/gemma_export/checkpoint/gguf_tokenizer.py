"""Rebuilds `tokenizer.json` from GGUF metadata. It gives the same ids as the original.

For Gemma 4, GGUF stores the ordered list of merges that `tokenizer.json` needs. For older families
it stores SentencePiece's pieces with scores. Then the order is that of transformers'
`convert_slow_tokenizer.generate_merges`, ties included, which gives exactly the original list.
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
    "GGUF vocabularies other than SentencePiece's and Gemma 4's (`tokenizer.ggml.model`)": "no "
    "Gemma has one; convert the model again",
}
MERGED = "gemma4"  # the `tokenizer.ggml.model` whose merges are stored
MERGES = "tokenizer.ggml.merges"  # "left right", best first
_SCORES, _TYPES = "tokenizer.ggml.scores", "tokenizer.ggml.token_type"


def rebuild_tokenizer(where: Path, metadata: Mapping[str, Value]) -> bytes:
    """The bytes of a `tokenizer.json`. Raises CheckpointError if the vocabulary is incomplete.

    Only <image_soft_token> is missing, because GGUF leaves out tokens that the text model lacks.
    """
    stored, types = _vocabulary(where, metadata)
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
    if metadata["tokenizer.ggml.model"] == MERGED:
        merges = _stored_merges(where, metadata, ids)
    else:
        merges = _merges(tokens, ids, _scores(where, metadata, len(tokens)), types)
    return tokenizer_json(tokens, types, merges, bos, unknown)


def _vocabulary(where: Path, metadata: Mapping[str, Value]) -> tuple[list[str], list[int]]:
    """The tokens and types in the metadata."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("llama", MERGED):
        raise CheckpointError(
            f"{where}: tokenizer.ggml.model is {kind!r:.40}, expected 'llama' (SentencePiece) or "
            f"{MERGED!r}; convert the model again from a folder with its tokenizer"
        )
    tokens = metadata.get(TOKENS)
    if not isinstance(tokens, list):
        raise CheckpointError(f"{where}: {TOKENS} is not a list of strings; convert again")
    return tokens, [int(kind) for kind in _one_each(where, metadata, _TYPES, "type", len(tokens))]


def _scores(where: Path, metadata: Mapping[str, Value], count: int) -> list[float]:
    return [float(one) for one in _one_each(where, metadata, _SCORES, "score", count)]


def _one_each(
    where: Path, metadata: Mapping[str, Value], key: str, name: str, count: int
) -> list[float]:
    values = metadata.get(key)
    if not isinstance(values, np.ndarray) or len(values) != count:
        raise CheckpointError(
            f"{where}: expected a {name} for every token of the vocabulary in {key}; convert the "
            "model again"
        )
    numbers: list[float] = values.tolist()
    return numbers


def _stored_merges(
    where: Path, metadata: Mapping[str, Value], ids: Mapping[str, int]
) -> list[tuple[str, str]]:
    """The pairs of pieces in the file. A space divides the two: no piece contains one."""
    stored = metadata.get(MERGES)
    if not isinstance(stored, list):
        raise CheckpointError(f"{where}: the vocabulary has no {MERGES}; convert the model again")
    merges: list[tuple[str, str]] = []
    for merge in stored:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= ids.keys():
            raise CheckpointError(
                f"{where}: {MERGES} has {merge!r:.40}, expected two pieces of the vocabulary that "
                "make a third; convert the model again"
            )
        merges.append((left, right))
    return merges


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
