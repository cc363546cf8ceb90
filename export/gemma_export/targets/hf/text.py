"""Writes the chat template and the settings of tokenizer and generation for transformers.

`tokenizer.json` itself is part of every bundle.
"""

from pathlib import Path
from typing import Any

import msgspec

from gemma_export.checkpoint import TokenizerFiles
from gemma_export.model.config import GemmaConfig
from gemma_export.targets import ExportJob

_PAD, _UNKNOWN = "<pad>", "<unk>"


def write_text_files(job: ExportJob, folder: Path) -> None:
    write_json(folder / "generation_config.json", _generation(job))
    files = job.checkpoint.tokenizer()
    if files is None:
        return
    write_json(folder / "tokenizer_config.json", _tokenizer(files, job.config))
    if files.chat_template is not None:
        (folder / "chat_template.jinja").write_text(files.chat_template, "utf-8")


def write_json(path: Path, content: object) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def _generation(job: ExportJob) -> dict[str, Any]:
    """The stop tokens and sampling values of the manifest."""
    fields = {"bos_token_id": job.config.bos_token, "eos_token_id": list(job.stop_tokens)}
    sampling = job.checkpoint.generation.sampling
    if sampling is None:
        return fields
    values = {"repetition_penalty": sampling.repetition_penalty}
    if is_sampled := sampling.temperature > 0:
        values |= {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
        }
    return fields | {"do_sample": is_sampled} | values


def _tokenizer(files: TokenizerFiles, config: GemmaConfig) -> dict[str, Any]:
    content = msgspec.json.decode(files.tokenizer_json)
    ids: dict[str, int] = dict(content["model"]["vocab"])
    ids |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    bos = {index: piece for piece, index in ids.items()}.get(config.bos_token)
    special = {"bos": bos, "eos": files.eos, "pad": _PAD, "unk": _UNKNOWN}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": piece for role, piece in special.items() if piece in ids},
    }
