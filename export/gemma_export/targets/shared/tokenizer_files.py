"""Writes the files that other programs expect beside a bundle's `tokenizer.json`."""

from pathlib import Path

import msgspec

from gemma_export.checkpoint import TokenizerFiles
from gemma_export.model.config import GemmaConfig
from gemma_runtime.formats.json_bytes import decode_json

_PAD, _UNKNOWN = "<pad>", "<unk>"


def write_json(path: Path, content: object) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def write_tokenizer_files(files: TokenizerFiles, config: GemmaConfig, folder: Path) -> None:
    """Write the names of the special tokens, and the chat template if there is one."""
    write_json(folder / "tokenizer_config.json", _tokenizer(files, config))
    if files.chat_template is not None:
        (folder / "chat_template.jinja").write_text(files.chat_template, "utf-8")


class _Added(msgspec.Struct):
    id: int
    content: str


class _Tokens(msgspec.Struct):
    """The part of `tokenizer.json` that names special tokens."""

    added_tokens: list[_Added] = []


def _tokenizer(files: TokenizerFiles, config: GemmaConfig) -> dict[str, object]:
    added = decode_json(files.tokenizer_json, _Tokens).added_tokens
    bos = next((token.content for token in added if token.id == config.bos_token), None)
    special = {"bos": bos, "eos": files.eos, "pad": _PAD, "unk": _UNKNOWN}
    known = {token.content for token in added}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": piece for role, piece in special.items() if piece in known},
    }
