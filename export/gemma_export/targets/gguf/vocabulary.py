"""Converts a `tokenizer.json` to GGUF metadata: the inverse of `gguf_tokenizer`.

For Gemma 4, GGUF stores the merges of `tokenizer.json` as they are. For older families it stores
scores: llama.cpp merges the pair whose result has the highest one. A token's score is minus the
position of the first merge that produces it. Both tokenize alike if all merges that produce a token
are adjacent in the list, as SentencePiece writes them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from gemma_export.checkpoint import Checkpoint
from gemma_export.checkpoint.gguf import GgufCheckpoint
from gemma_export.checkpoint.gguf_config import TOKENS
from gemma_export.checkpoint.gguf_tokenizer import MERGED, MERGES
from gemma_export.checkpoint.piece_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PLACEHOLDER,
    SHOWN,
    SPACE,
    USER_DEFINED,
)
from gemma_export.formats.gguf_file import read_header
from gemma_export.model.config import GemmaConfig
from gemma_export.model.families import FAMILIES
from gemma_runtime.errors import CheckpointError
from gemma_runtime.formats.gguf import Value

_PREFIX = "tokenizer."
_SCORES, _TYPES = "tokenizer.ggml.scores", "tokenizer.ggml.token_type"
_TURN_ENDS = (("eot", "<end_of_turn>"), ("eot", "<turn|>"))
_UNUSED = 5
_LOWEST = -1000.0  # score that llama.cpp's converter gives tokens without merges


def gguf_vocabulary(checkpoint: Checkpoint) -> dict[str, Value]:
    """The `tokenizer.*` keys: copied from a GGUF source, or converted from `tokenizer.json`.

    Raises CheckpointError if llama.cpp would tokenize differently.
    """
    if isinstance(checkpoint, GgufCheckpoint):
        metadata = read_header(checkpoint.path).metadata
        if TOKENS in metadata:
            own = {key: value for key, value in metadata.items() if key.startswith(_PREFIX)}
            return _padded(own, checkpoint.config.vocab_size)
    files = checkpoint.tokenizer()
    if files is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    keys = make_vocabulary(checkpoint.id, files.tokenizer_json, checkpoint.config)
    if files.chat_template is not None:
        keys["tokenizer.chat_template"] = files.chat_template
    return keys


def _padded(keys: dict[str, Value], rows: int) -> dict[str, Value]:
    """Add [PAD…] tokens: llama.cpp needs one per row of the table; its converter adds them too."""
    pieces = keys[TOKENS]
    assert isinstance(pieces, list)
    if missing := range(len(pieces), rows):
        keys[TOKENS] = pieces + [f"[PAD{index}]" for index in missing]
        for key, value in ((_SCORES, _LOWEST), (_TYPES, _UNUSED)):
            values = keys.get(key)
            if isinstance(values, np.ndarray):
                keys[key] = np.append(values, np.full(len(missing), value, values.dtype))
    return keys


def make_vocabulary(where: str, tokenizer_json: bytes, config: GemmaConfig) -> dict[str, Value]:
    """The keys for a `tokenizer.json` like Gemma's: BPE with byte fallback."""
    content: dict[str, Any] = msgspec.json.decode(tokenizer_json)
    model = content["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise CheckpointError(
            f"{where}: tokenizer.json has type {model.get('type')!r:.40}, expected BPE with byte "
            "fallback, like Gemma's"
        )
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    by_id = {index: piece for piece, index in model["vocab"].items()}
    by_id |= {index: token["content"] for index, token in added.items()}
    pieces = [by_id.get(index, f"[PAD{index}]") for index in range(config.vocab_size)]
    kind = FAMILIES[config.family].gguf.vocabulary
    # Gemma's vocabularies contain the tab character instead of <0x09>.
    tabs = ("\t",) if kind != MERGED and "<0x09>" not in model["vocab"] else ()
    types = [
        _type(piece, added.get(index), tabs) if index in by_id else _UNUSED
        for index, piece in enumerate(pieces)
    ]
    merges = [_pair(merge) for merge in model["merges"]]
    return {
        "tokenizer.ggml.model": kind,
        TOKENS: [_text(piece, kind) for piece, kind in zip(pieces, types, strict=True)],
        _TYPES: np.array(types, np.int32),
        **(_ranks(pieces, merges) if kind == MERGED else _scores(where, pieces, types, merges)),
        **_special(pieces, config, model.get("unk_token")),
    }


def _ranks(pieces: Sequence[str], merges: Sequence[tuple[str, str]]) -> dict[str, Value]:
    return {
        MERGES: [f"{left} {right}" for left, right in merges],
        _SCORES: np.full(len(pieces), _LOWEST, np.float32),  # llama.cpp's converter writes them too
    }


def _type(piece: str, added: Mapping[str, Any] | None, tabs: tuple[str, ...]) -> int:
    if added is not None:
        special = added["special"] and piece not in SHOWN
        is_control = special or PLACEHOLDER.fullmatch(piece)
        return CONTROL if is_control else USER_DEFINED
    is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", piece) or piece in tabs
    return BYTE if is_byte else NORMAL


def _text(piece: str, kind: int) -> str:
    """As llama.cpp wants it: it reads the number of a byte from its name, also that of the tab."""
    if kind == BYTE and piece == "\t":
        return "<0x09>"
    return piece.replace(SPACE, " ") if kind == USER_DEFINED else piece


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Older files join the two with a space, which no piece contains."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _scores(
    where: str, pieces: Sequence[str], types: Sequence[int], merges: Sequence[tuple[str, str]]
) -> dict[str, Value]:
    normal = {piece for piece, kind in zip(pieces, types, strict=True) if kind == NORMAL}
    places: dict[str, int] = {}
    before = ""
    for left, right in merges:
        merged = left + right
        if merged in normal and merged != before:
            if merged in places:
                raise CheckpointError(
                    f"{where}: tokenizer.json merges into {merged!r:.40} at two places, which "
                    "llama.cpp's scores can't express; expected merges in SentencePiece's order"
                )
            places[merged] = len(places)
            before = merged
    rest = (piece for piece in pieces if piece in normal and piece not in places)
    places |= {piece: len(places) + index for index, piece in enumerate(rest)}
    scores = [
        -float(places[piece]) if kind == NORMAL else 0.0 if kind == BYTE else _LOWEST
        for piece, kind in zip(pieces, types, strict=True)
    ]
    return {"tokenizer.ggml.pre": "default", _SCORES: np.array(scores, np.float32)}


def _special(pieces: Sequence[str], config: GemmaConfig, unknown: str | None) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "tokenizer.ggml.bos_token_id": config.bos_token,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    if config.eos_tokens:
        keys["tokenizer.ggml.eos_token_id"] = config.eos_tokens[0]
    for key, piece in (("unknown", unknown), ("padding", "<pad>"), *_TURN_ENDS):
        if piece in pieces:
            keys[f"tokenizer.ggml.{key}_token_id"] = pieces.index(piece)
    return keys
