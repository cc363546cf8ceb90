"""`tokenizer.json` boiled down for phones: 4 MB instead of 33, read without a JSON parser.

Numbers are little-endian; V is the count of ids.

    4 bytes      magic "GTOK"
    uint32       version, 1
    uint32       V
    uint32       bytes of text
    int32[256]   the id of each byte's token, -1 where the byte is a piece as it is
    int32[V]     rank of the merge that makes the piece, -1 where none does
    uint16[V]    bytes of the piece's text; 0 where the id has no piece
    uint8[V]     kind: 0 piece, 1 added, 2 special, 3 reserved, 4 byte
    the pieces' texts, UTF-8, in order of their ids

Text is encoded in three steps. Added, special and reserved pieces are found in the raw text,
leftmost first, then longest; special ones stay text. What is between them has its spaces turned to
U+2581 and is cut into single characters, or their bytes' tokens. Then the neighbours whose joined
text is a piece with a rank merge: the lowest rank first, then the longer left half, the longer
right half, and the leftmost. That this is the list of merges, the writer checks.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import msgspec
import numpy as np

from gemma_runtime.errors import TokenizerError
from gemma_runtime.text.tokenizer import RESERVED

MAGIC, VERSION = b"GTOK", 1
_SPACE = "▁"
_Merge = tuple[str, str]


class Kind(IntEnum):
    PIECE = 0
    ADDED = 1  # found in raw text, whole
    SPECIAL = 2  # a template's alone; in a user's text its name is letters
    RESERVED = 3  # as well, but found in raw text: there it has to be cut in two
    BYTE = 4


def compact_tokenizer(tokenizer_json: bytes) -> bytes:
    """The compact file; raises TokenizerError for a tokenizer that is not built as Gemma's is."""
    try:
        source = msgspec.json.decode(tokenizer_json, type=_Source)
    except msgspec.DecodeError as error:
        raise _unlike(f"can't be read: {error}") from error
    _check_steps(source)
    pieces = _pieces(source)
    byte_tokens = _byte_tokens(source)
    kinds = np.zeros(len(pieces), np.uint8)
    kinds[byte_tokens[byte_tokens >= 0]] = Kind.BYTE
    for added in source.added_tokens:
        kinds[added.id] = _kind(added)
    texts = [piece.encode() for piece in pieces]
    if max(map(len, texts)) > 0xFFFF:
        raise _unlike("has a piece longer than 65535 bytes")
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


def _unlike(what: str) -> TokenizerError:
    return TokenizerError(f"tokenizer.json {what}, which the compact form for phones can't hold")


def _check_steps(source: _Source) -> None:
    model, normalizer, cut = source.model, source.normalizer, source.pre_tokenizer
    if model.type != "BPE" or not model.byte_fallback or model.ignore_merges or model.dropout:
        raise _unlike("is not BPE with a fallback to bytes")
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        raise _unlike("marks the pieces of a word")
    if normalizer != _Step("Replace", {"String": " "}, _SPACE):
        raise _unlike("normalizes other than by turning spaces into U+2581")
    # There is no space left to split at.
    if cut is not None and (cut.type, cut.pattern) != ("Split", {"String": " "}):
        raise _unlike("splits words before it merges")
    for added in source.added_tokens:
        if added.single_word or added.lstrip or added.rstrip or added.normalized:
            raise _unlike(f"finds {added.content!r} in other than raw text")
        if len(added.content) < 2 and model.vocab.get(added.content) != added.id:
            raise _unlike(f"adds the character {added.content!r} outside of its vocabulary")


def _pieces(source: _Source) -> list[str]:
    """By id; empty where an id has none."""
    ids = source.model.vocab | {added.content: added.id for added in source.added_tokens}
    largest = max(ids.values(), default=-1)
    if min(ids.values(), default=-1) < 0 or largest >= 1 << 22:
        raise _unlike("has ids below 0 or above 4 million, or none")
    pieces = [""] * (largest + 1)
    for piece, token in ids.items():
        if pieces[token]:
            raise _unlike(f"gives the id {token} twice")
        pieces[token] = piece
    return pieces


def _byte_tokens(source: _Source) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    vocab = source.model.vocab
    for byte in range(256):
        if f"<0x{byte:02X}>" not in vocab and (byte >= 0x80 or chr(byte) not in vocab):
            raise _unlike(f"has no token for the byte {byte:#04x}")
    return np.array([vocab.get(f"<0x{byte:02X}>", -1) for byte in range(256)], np.int64)


def _kind(added: _Added) -> Kind:
    if added.special:
        return Kind.SPECIAL
    return Kind.RESERVED if re.fullmatch(RESERVED, added.content) else Kind.ADDED


def _ranks(source: _Source, pieces: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """A rank for each piece that merges make, from the list of merges."""
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
    """Each way to cut a merged piece into two pieces is a merge, once, and nothing else is."""
    products = {left + right for left, right in merges}
    known = products <= vocab.keys() and all(a in vocab and b in vocab for a, b in merges)
    splits = sum(
        1
        for piece in products
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    )
    if not known or not splits == len(merges) == len(set(merges)):
        raise _unlike("lists merges that its vocabulary does not imply")


def _groups(merges: Sequence[_Merge]) -> Iterator[Sequence[_Merge]]:
    """The merges cut into the shortest runs that hold every merge of the pieces they make."""
    last = {left + right: place for place, (left, right) in enumerate(merges)}
    start = end = 0
    for place, (left, right) in enumerate(merges):
        end = max(end, last[left + right])
        if place == end:
            yield merges[start : place + 1]
            start = place + 1


def _check_order(group: Sequence[_Merge]) -> None:
    """Longer left halves come first; a run of several pieces is of runs of one character."""
    lengths = [(-len(left), -len(right)) for left, right in group]
    mixed = len({left + right for left, right in group}) > 1
    if lengths != sorted(lengths) or (mixed and any(len(set(a + b)) > 1 for a, b in group)):
        raise _unlike(f"orders the merges of {''.join(group[0])!r} in a way of its own")
