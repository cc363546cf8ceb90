"""Writes `tokenizer.json` for SentencePiece's pieces, as Gemma's tokenizers have it."""

import re
from collections.abc import Mapping, Sequence

import msgspec

# SentencePiece's types of pieces; llama.cpp's llama_token_type has the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACE = "▁"
# Tokens for which the original's `special` flag differs from what the type says: not set for
# placeholders, set for turns and for tokens that llama.cpp shows, of images, thoughts and calls.
PLACEHOLDER = re.compile(r"<unused\d+>|<mask>")
SHOWN = (
    "<start_of_image>",
    "<end_of_image>",
    "<|channel>",
    "<channel|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
)
_SPECIAL = (*SHOWN, "<start_of_turn>", "<end_of_turn>")


def tokenizer_json(
    tokens: Sequence[str],
    types: Sequence[int],
    merges: Sequence[tuple[str, str]],
    bos: str,
    unknown: str,
) -> bytes:
    """The bytes of a `tokenizer.json`. Tokens must be unique, merges in order, best first."""
    ids = {token: index for index, token in enumerate(tokens)}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": ids,
        "merges": merges,
    }
    added = _added_tokens(tokens, types)
    return msgspec.json.encode(_frame(bos, ids[bos]) | {"added_tokens": added, "model": model})


def splits_of(tokens: Sequence[str], ids: Mapping[str, int], index: int) -> list[tuple[str, str]]:
    """Every way to cut a token into two tokens, those with lower ids first."""
    token = tokens[index]
    splits: list[tuple[int, int]] = []
    for cut in range(1, len(token)):
        left = ids.get(token[:cut])
        if left is not None and (right := ids.get(token[cut:])) is not None:
            splits.append((left, right))
    return [(tokens[left], tokens[right]) for left, right in sorted(splits)]


def _added_tokens(tokens: Sequence[str], types: Sequence[int]) -> list[dict[str, object]]:
    """The tokens that are matched in raw text, before BPE."""
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token in _SPECIAL
            or (kind != USER_DEFINED and not PLACEHOLDER.fullmatch(token)),
        }
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _frame(bos: str, bos_id: int) -> dict[str, object]:
    """The parts of `tokenizer.json` that are the same for every Gemma."""
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    second = {"SpecialToken": {"id": bos, "type_id": 1}}
    text, other = (
        {"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB")
    )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, second, other],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    }
