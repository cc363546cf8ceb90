"""Writes the chat template and the settings of tokenizer and generation for transformers.

`tokenizer.json` itself is part of every bundle.
"""

from pathlib import Path
from typing import Any

import msgspec

from gemma_export.checkpoint import TokenizerFiles
from gemma_export.checkpoint.folder import FolderCheckpoint
from gemma_export.targets import ExportJob

_TOKENIZER, _GENERATION = "tokenizer_config.json", "generation_config.json"
# Fields of tokenizer_config.json → the pieces in Gemma's vocabularies.
_SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}


def write_text_files(job: ExportJob, folder: Path) -> None:
    """The source folder's settings if it has them, else those that Gemma's vocabulary implies."""
    generation = {
        **_of_source(job, _GENERATION),
        "bos_token_id": job.config.bos_token,
        "eos_token_id": list(job.stop_tokens),
    }
    _write(folder / _GENERATION, generation)
    files = job.checkpoint.tokenizer()
    if files is None:
        return
    _write(folder / _TOKENIZER, _of_source(job, _TOKENIZER) or _settings(files))
    if files.chat_template is not None:
        (folder / "chat_template.jinja").write_text(files.chat_template, "utf-8")


def _of_source(job: ExportJob, name: str) -> dict[str, Any]:
    if not isinstance(job.checkpoint, FolderCheckpoint):
        return {}
    path = job.checkpoint.folder / name
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) if path.exists() else {}


def _settings(files: TokenizerFiles) -> dict[str, Any]:
    content = msgspec.json.decode(files.tokenizer_json)
    known = {token["content"] for token in content.get("added_tokens", [])}
    known |= set(content["model"]["vocab"])
    special = {field: piece for field, piece in _SPECIAL.items() if piece in known}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
    }


def _write(path: Path, content: object) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
