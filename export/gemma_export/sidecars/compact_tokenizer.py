"""Converts `tokenizer.json` to a compact binary file for phones: 4 MB instead of 33.

Layout, with little-endian numbers; V is the number of ids:

    4 bytes      magic "GTOK"
    uint32       version, 1
    uint32       V
    uint32       size of all texts in bytes
    int32[256]   id of each byte's token, -1 if the byte is an ordinary piece
    int32[V]     rank of the merges that produce the piece, -1 if there are none
    uint16[V]    size of the piece's text in bytes; 0 if the id has no piece
    uint8[V]     kind: 0 piece, 1 added, 2 special, 3 reserved, 4 byte
    the pieces' texts, UTF-8, in order of their ids

A reader encodes text in three steps. It finds added, special and reserved pieces in the raw text,
leftmost first, then longest; special ones stay text. In the text between them it replaces spaces by
U+2581 and splits it into characters, or into byte tokens for unknown characters. Then it merges
neighbours whose joined text is a piece with a rank: lowest rank first, then the longer left half,
then the longer right half, then the leftmost. The writer checks that this order equals the
tokenizer's list of merges.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import msgspec
import numpy as np

from gemma_runtime.errors import TokenizerError
from gemma_runtime.formats.json_bytes import decode_json
from gemma_runtime.text.tokenizer import CALLS, RESERVED

MAGIC, VERSION = b"GTOK", 1
_SPACE = "▁"
_Merge = tuple[str, str]


class Kind(IntEnum):
    PIECE = 0
    ADDED = 1  # matched in raw text, and encoded as one token
    SPECIAL = 2  # only templates write it; in user text its name is ordinary text
    RESERVED = 3  # like SPECIAL, but tokenizers matches it in raw text, so user text is split there
    BYTE = 4


def compact_tokenizer(tokenizer_json: bytes) -> bytes:
    """The compact file. Raises TokenizerError for a tokenizer that is not built like Gemma's."""
    try:
        source = decode_json(tokenizer_json, _Source)
    except msgspec.DecodeError as error:
        raise _unsupported(f"can't be read: {error}") from error
    _check_steps(source)
    pieces = _pieces(source)
    byte_tokens = _byte_tokens(source)
    kinds = np.zeros(len(pieces), np.uint8)
    kinds[byte_tokens[byte_tokens >= 0]] = Kind.BYTE
    for added in source.added_tokens:
        kinds[added.id] = _kind(added)
    texts = [piece.encode() for piece in pieces]
    if max(map(len, texts)) > 0xFFFF:
        raise _unsupported("has a piece longer than 65535 bytes")
    blob = b"".join(texts)
    return b"".join(
        (
            struct.pack("<4sIII", MAGIC, VERSION, len(pieces), len(blob)),
            byte_tokens.astype("<i4").tobytes(),
            _ranks(source, pieces).astype("<i4").tobytes(),
            np.array([len(text) for text in texts], "<u2").tobytes(),
            kinds.tobytes(),
            blob,
        )
    )


@dataclass(frozen=True, slots=True)
class _Model:
    type: str
    vocab: dict[str, int]
    merges: list[str | _Merge]
    byte_fallback: bool = False
    ignore_merges: bool = False
    dropout: float | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None


@dataclass(frozen=True, slots=True)
class _Added:
    id: int
    content: str
    special: bool
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


@dataclass(frozen=True, slots=True)
class _Step:
    """A normalizer or a pre-tokenizer."""

    type: str
    pattern: dict[str, str] = field(default_factory=dict)
    content: str | None = None


@dataclass(frozen=True, slots=True)
class _Source:
    model: _Model
    added_tokens: list[_Added]
    normalizer: _Step | None
    pre_tokenizer: _Step | None


def _unsupported(reason: str) -> TokenizerError:
    return TokenizerError(f"tokenizer.json {reason}, which tokenizer.gtok doesn't support")


def _check_steps(source: _Source) -> None:
    model, normalizer, cut = source.model, source.normalizer, source.pre_tokenizer
    if model.type != "BPE" or not model.byte_fallback or model.ignore_merges or model.dropout:
        raise _unsupported("is not BPE with byte fallback")
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        raise _unsupported("marks the pieces of a word")
    if normalizer != _Step("Replace", {"String": " "}, _SPACE):
        raise _unsupported("has a normalizer other than spaces to U+2581")
    # Splitting at spaces has no effect, because the normalizer leaves none.
    if cut is not None and (cut.type, cut.pattern) != ("Split", {"String": " "}):
        raise _unsupported("has a pre-tokenizer that splits words")
    for added in source.added_tokens:
        if added.single_word or added.lstrip or added.rstrip or added.normalized:
            raise _unsupported(f"doesn't match the token {added.content!r} in raw text exactly")
        if len(added.content) < 2 and model.vocab.get(added.content) != added.id:
            raise _unsupported(f"adds the character {added.content!r} outside its vocabulary")


def _pieces(source: _Source) -> list[str]:
    """The piece of every id; "" for an id without one."""
    ids = source.model.vocab | {added.content: added.id for added in source.added_tokens}
    largest = max(ids.values(), default=-1)
    if min(ids.values(), default=-1) < 0 or largest >= 1 << 22:
        raise _unsupported("has no ids, or ids below 0 or above 4 million")
    pieces = [""] * (largest + 1)
    for piece, token in ids.items():
        if pieces[token]:
            raise _unsupported(f"uses the id {token} twice")
        pieces[token] = piece
    return pieces


def _byte_tokens(source: _Source) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    vocab = source.model.vocab
    for byte in range(256):
        if f"<0x{byte:02X}>" not in vocab and (byte >= 0x80 or chr(byte) not in vocab):
            raise _unsupported(f"has no token for the byte {byte:#04x}")
    return np.array([vocab.get(f"<0x{byte:02X}>", -1) for byte in range(256)], np.int64)


def _kind(added: _Added) -> Kind:
    if added.special:
        return Kind.SPECIAL
    is_control = re.fullmatch(f"{RESERVED}|{CALLS}", added.content)
    return Kind.RESERVED if is_control else Kind.ADDED


def _ranks(source: _Source, pieces: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The rank of each piece, (V,): its merges' position in the list; -1 without merges."""
    vocab = source.model.vocab
    merges = [_split(merge) for merge in source.model.merges]
    _check_splits(merges, vocab)
    ranks = np.full(len(pieces), -1, np.int64)
    for rank, group in enumerate(_groups(merges)):
        _check_order(group)
        for left, right in group:
            ranks[vocab[left + right]] = rank
    return ranks


def _split(merge: str | _Merge) -> _Merge:
    if not isinstance(merge, str):
        return merge
    left, _, right = merge.partition(" ")
    return left, right


def _check_splits(merges: Sequence[_Merge], vocab: dict[str, int]) -> None:
    """Check that the merges are exactly all splits of the merged pieces into two pieces."""
    products = {left + right for left, right in merges}
    all_in_vocab = products <= vocab.keys() and all(a in vocab and b in vocab for a, b in merges)
    splits = sum(
        1
        for piece in products
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    )
    if not all_in_vocab or not splits == len(merges) == len(set(merges)):
        raise _unsupported("has merges other than those that its vocabulary implies")


def _groups(merges: Sequence[_Merge]) -> Iterator[Sequence[_Merge]]:
    """Split the merges into the shortest runs such that no piece has merges in two runs."""
    last = {left + right: index for index, (left, right) in enumerate(merges)}
    start = end = 0
    for index, (left, right) in enumerate(merges):
        end = max(end, last[left + right])
        if index == end:
            yield merges[start : index + 1]
            start = index + 1


def _check_order(group: Sequence[_Merge]) -> None:
    """Check the order within a run: longer left halves first.

    A run of several pieces is allowed only if each piece repeats one character.
    """
    lengths = [(-len(left), -len(right)) for left, right in group]
    mixed = len({left + right for left, right in group}) > 1
    if lengths != sorted(lengths) or (mixed and any(len(set(a + b)) > 1 for a, b in group)):
        raise _unsupported(f"has an unusual order of the merges of {''.join(group[0])!r}")
