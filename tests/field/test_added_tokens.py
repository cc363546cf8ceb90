"""Tokens that only `tokenizer_config.json` or `added_tokens.json` name are added."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from gemma_export.checkpoint.tokenizer_folder import read_tokenizer
from gemma_runtime.errors import CheckpointError
from tests.runtime.conftest import small_tokenizer

SIZE = small_tokenizer().get_vocab_size()
LISTED = {
    str(index): {"content": token.content, "special": token.special, "normalized": False}
    for index, token in small_tokenizer().get_added_tokens_decoder().items()
}
TURN = {"content": "<|im_start|>", "special": True, "lstrip": False, "rstrip": False}
END = {"content": "<|im_end|>", "special": True, "lstrip": True, "normalized": False}
WORD = {"content": "user", "special": False, "normalized": True}
BASE = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
FILES: dict[str, dict[str, Any]] = {
    "nothing new": {"tokenizer_config.json": BASE},
    "listed with ids": {
        "tokenizer_config.json": BASE
        | {"added_tokens_decoder": LISTED | {str(SIZE + 1): END, str(SIZE): TURN, "9000": WORD}}
    },
    "added_tokens.json": {
        "tokenizer_config.json": BASE,
        "added_tokens.json": {"<|im_end|>": SIZE + 1, "<|im_start|>": SIZE},
    },
    "added_tokens.json, special by name": {
        "tokenizer_config.json": BASE | {"additional_special_tokens": ["<|im_start|>"]},
        "added_tokens.json": {"<|im_end|>": SIZE + 1, "<|im_start|>": SIZE},
    },
    "a list hides added_tokens.json": {
        "tokenizer_config.json": BASE | {"added_tokens_decoder": LISTED | {str(SIZE): TURN}},
        "added_tokens.json": {"<|im_end|>": SIZE},
    },
    "named as end": {"tokenizer_config.json": BASE | {"eos_token": "<|im_end|>"}},
    "named as extra": {
        "tokenizer_config.json": BASE | {"extra_special_tokens": ["<|im_end|>", "<|im_start|>"]}
    },
    "named for a role": {
        "tokenizer_config.json": BASE
        | {"turn_token": "<|im_start|>", "extra_special_tokens": {"end_token": "<|im_end|>"}}
    },
    "special_tokens_map.json": {
        "tokenizer_config.json": BASE,
        "special_tokens_map.json": {
            "eos_token": {"content": "<|im_end|>", "lstrip": False, "rstrip": False},
            "additional_special_tokens": ["<|im_start|>"],
        },
    },
}
TEXTS = (
    "<|im_start|>user\nhi <|im_end|>\n<|im_start|>assistant\n",
    "the user's <|im_end|><|im_end|>",
    "a  b<|im_ start|> <eos>",
)


def write(folder: Path, files: dict[str, Any]) -> Path:
    small_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "gemma3_text"}')
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("files", FILES.values(), ids=list(FILES))
def test_ids_are_those_of_transformers(tmp_path: Path, files: dict[str, Any]) -> None:
    write(tmp_path, files)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    read = read_tokenizer(tmp_path, SIZE + 10)
    assert read is not None
    assert read.notes == ()
    ours = Tokenizer.from_str(read.tokenizer_json.decode())
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == reference.encode(text, add_special_tokens=False)
    # transformers makes Gemma's <mask> special; here its name alone makes it a control token
    assert special(ours.get_added_tokens_decoder()) == special(reference.added_tokens_decoder) - {
        "<mask>"
    }


def special(added: Mapping[int, AddedToken]) -> set[str]:
    return {token.content for token in added.values() if token.special}


def test_a_tokenizer_that_lacks_nothing_is_kept_byte_by_byte(tmp_path: Path) -> None:
    write(tmp_path, FILES["nothing new"])
    read = read_tokenizer(tmp_path, SIZE)
    assert read is not None
    assert read.tokenizer_json == (tmp_path / "tokenizer.json").read_bytes()


def test_a_token_that_the_model_has_no_row_for_is_left_out_with_a_note(tmp_path: Path) -> None:
    write(tmp_path, FILES["listed with ids"])
    read = read_tokenizer(tmp_path, SIZE + 1)
    assert read is not None
    assert [note.partition(": ")[2] for note in read.notes] == [
        f"the added token <|im_end|> is left out, because the model has rows for {SIZE + 1} tokens"
        " only"
    ]
    assert Tokenizer.from_str(read.tokenizer_json.decode()).token_to_id("<|im_start|>") == SIZE


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("added_tokens.json", "[1]", "added_tokens.json is not a JSON object"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("added_tokens.json", '{"<a>": "x"}', "an added token in .* has no id or no content"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {}}}', "no id or no content"),
    ],
)
def test_a_damaged_list_is_refused_by_name(
    tmp_path: Path, name: str, content: str, match: str
) -> None:
    write(tmp_path, {})
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=match):
        read_tokenizer(tmp_path, SIZE)
