"""Builds `tokenizer.json` from a SentencePiece model, for folders that have `tokenizer.model` only.

The ids are those of transformers' GemmaTokenizer, which makes a BPE of any SentencePiece model and
orders its merges by the id of the merged piece. Merges into the same piece are in the order of
Gemma's own tokenizer.json, which phones need; transformers has them in the reverse order, which
gave the same ids for all texts tried.
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from gemma_export.checkpoint.piece_tokenizer import NORMAL, UNKNOWN, splits_of, tokenizer_json
from gemma_runtime.errors import CheckpointError
from gemma_runtime.formats.protobuf import Damaged, ProtoMessage

_PIECES, _TRAINER = 1, 2  # fields of ModelProto
_TEXT, _TYPE = 1, 3  # fields of SentencePiece
_BOS_ID = 41  # field of TrainerSpec
_DEFAULT_BOS = 1


def tokenizer_from_sentencepiece(path: Path) -> bytes:
    """The bytes of a `tokenizer.json`. Raises CheckpointError if the file is not such a model."""
    try:
        tokens, types, bos = _read(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    except Damaged as error:
        raise CheckpointError(
            f"{path} is not a SentencePiece model ({error}); download it again"
        ) from error
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise CheckpointError(f"{path} has two pieces of the same text; train or download it again")
    if UNKNOWN not in types:
        raise CheckpointError(f"{path} has no unknown piece, expected one such as <unk>")
    if not 0 <= bos < len(tokens):
        raise CheckpointError(f"{path} names piece {bos} as bos, expected one of {len(tokens)}")
    unknown = tokens[types.index(UNKNOWN)]
    return tokenizer_json(tokens, types, _merges(tokens, ids), tokens[bos], unknown)


def _read(data: bytes) -> tuple[list[str], list[int], int]:
    """The pieces, their types and the id of bos."""
    model = ProtoMessage(data)
    pieces = list(model.messages(_PIECES))
    if not pieces:
        raise Damaged("it has no pieces")
    types = [piece.number(_TYPE) if _TYPE in piece else NORMAL for piece in pieces]
    trainer = model.message(_TRAINER)
    bos = trainer.number(_BOS_ID) if _BOS_ID in trainer else _DEFAULT_BOS
    return [piece.text(_TEXT) for piece in pieces], types, bos


def _merges(tokens: Sequence[str], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces: lower ids first, then the longer left half."""
    return [
        split
        for index in range(len(tokens))
        for split in sorted(splits_of(tokens, ids, index), key=lambda split: -len(split[0]))
    ]
