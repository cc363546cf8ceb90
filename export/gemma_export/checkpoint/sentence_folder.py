"""Reads what a sentence-transformers folder has beside the model: dense layers, prompts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gemma_export.formats.downloaded import check_downloaded
from gemma_export.formats.json_file import read_json
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_runtime.errors import CheckpointError
from gemma_runtime.formats.json_bytes import decode_json
from gemma_runtime.formats.names import stays_inside

MODULES = "modules.json"
_PROMPTS = "config_sentence_transformers.json"
_LENGTH = "sentence_bert_config.json"
_WEIGHTS, _WEIGHT = "model.safetensors", "linear.weight"
_IDENTITY = "torch.nn.modules.linear.Identity"
# The documentation's table.
REFUSED: Mapping[str, str] = {
    f"an encoder's folder without `{MODULES}`": "it does not say how a vector is made",
    "an encoder's `tokenizer.model` without `tokenizer.json`": "it does not say what is put "
    "around a text",
    "pooling other than the mean, dense layers with a bias or an activation": "no EmbeddingGemma "
    "has them",
}


@dataclass(frozen=True, slots=True)
class EncoderFiles:
    """How a folder's model makes a vector of a text."""

    dense: tuple[SafetensorsFile, ...]  # of the layers behind the mean, in order
    prompts: Mapping[str, str]  # what a task begins a text with, by its name
    default_prompt: str | None
    max_tokens: int | None

    @property
    def widths(self) -> tuple[int, ...]:
        """Outputs of the dense layers."""
        return tuple(file.tensors[_WEIGHT].shape[0] for file in self.dense)

    @property
    def places(self) -> list[tuple[SafetensorsFile, str]]:
        """File and stored name of each dense layer's weight."""
        return [(file, _WEIGHT) for file in self.dense]


class _Module(msgspec.Struct):
    type: str  # a class of sentence-transformers, whose package differs by version
    path: str  # of its folder


class _Prompts(msgspec.Struct):
    prompts: dict[str, str] = {}
    default_prompt_name: str | None = None


def read_encoder(folder: Path) -> EncoderFiles:
    """Raises CheckpointError for modules other than a mean, dense layers and a unit length."""
    kinds = [(module.type.rpartition(".")[2], module.path) for module in _modules(folder)]
    names = [name for name, _ in kinds]
    inner = kinds[2:-1]
    if names[:2] != ["Transformer", "Pooling"] or names[-1] != "Normalize" or len(names) < 3:
        raise CheckpointError(
            f"{folder / MODULES} has the modules {', '.join(names)}; expected Transformer, "
            "Pooling, any number of Dense, and Normalize"
        )
    if others := [name for name, _ in inner if name != "Dense"]:
        raise CheckpointError(f"{folder / MODULES} has a module {others[0]}; expected only Dense")
    if kinds[0][1] not in ("", "."):
        raise CheckpointError(
            f"{folder / MODULES} has its Transformer in {kinds[0][1]!r:.80}; expected the folder "
            "itself"
        )
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        raise CheckpointError(
            f"{folder} has tokenizer.model without tokenizer.json, which says what is put around a "
            "text; download it, or save the model again with transformers"
        )
    _check_pooling(folder / kinds[1][1] / "config.json")
    prompts = _read_prompts(folder / _PROMPTS)
    return EncoderFiles(
        dense=tuple(_open_dense(folder / path) for _, path in inner),
        prompts=prompts.prompts,
        default_prompt=prompts.default_prompt_name,
        max_tokens=_max_tokens(folder / _LENGTH),
    )


def _modules(folder: Path) -> list[_Module]:
    path = folder / MODULES
    check_downloaded(path)
    if not path.exists():
        raise CheckpointError(
            f"{folder} is an encoder without {MODULES}, which says how a vector is made; give a "
            "sentence-transformers folder, such as google/embeddinggemma-300m"
        )
    modules: list[_Module] = _decode(path, list[_Module])
    for module in modules:
        if not stays_inside(module.path):
            raise CheckpointError(f"{path} names {module.path!r:.80}, outside the folder")
    return modules


def _decode(path: Path, kind: Any) -> Any:
    try:
        return decode_json(path.read_bytes(), kind)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"can't read {path}: {error}") from error


def _check_pooling(path: Path) -> None:
    config = read_json(path)
    flags = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    mode = config.get("pooling_mode", flags)
    if mode not in ("mean", ["mean"], ["pooling_mode_mean_tokens"]):
        raise CheckpointError(
            f"{path}: the pooling is {mode!r:.80}, expected the mean of all tokens"
        )
    if config.get("include_prompt") is False:
        raise CheckpointError(f"{path}: include_prompt is false, expected the mean of all tokens")


def _open_dense(folder: Path) -> SafetensorsFile:
    config = read_json(folder / "config.json")
    activation = config.get("activation_function", _IDENTITY)
    if config.get("bias") or activation != _IDENTITY:
        raise CheckpointError(
            f"{folder / 'config.json'}: bias is {config.get('bias')!r:.20} and activation_function "
            f"{activation!r:.80}; expected a matrix alone: false and {_IDENTITY}"
        )
    path = folder / _WEIGHTS
    check_downloaded(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; download it")
    file = SafetensorsFile(path)
    if list(file.tensors) != [_WEIGHT] or len(file.tensors[_WEIGHT].shape) != 2:
        raise CheckpointError(
            f"{path} has {', '.join(file.tensors)[:200]}; expected one matrix, {_WEIGHT}"
        )
    return file


def _read_prompts(path: Path) -> _Prompts:
    if not path.exists():
        return _Prompts()
    check_downloaded(path)
    prompts: _Prompts = _decode(path, _Prompts)
    if prompts.default_prompt_name not in (None, *prompts.prompts):
        raise CheckpointError(
            f"{path}: default_prompt_name is {prompts.default_prompt_name!r:.80}, which is none of "
            "its prompts"
        )
    return prompts


def _max_tokens(path: Path) -> int | None:
    length = read_json(path).get("max_seq_length") if path.exists() else None
    if length is not None and (not isinstance(length, int) or length < 1):
        raise CheckpointError(
            f"{path}: max_seq_length is {length!r:.80}, expected a number above 0"
        )
    return length
