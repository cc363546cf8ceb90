"""Chooses the weight files of a folder, in transformers' order: one file first, else the index."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gemma_export.checkpoint.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from gemma_export.formats.downloaded import check_downloaded
from gemma_export.formats.json_file import read_json
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_runtime.errors import CheckpointError
from gemma_runtime.formats.names import is_file_name

CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SMALL_FILES = (".json", ".model", ".jinja")
# The documentation's tables. Of the layouts, the first that the folder has is read.
LAYOUTS: Mapping[str, str] = {
    "`transformers_weights` in `config.json`": "the file or index of that name",
    f"`{_SINGLE}`": "this file alone; a note names other safetensors files and an index",
    f"`{_INDEX}`": "the files that the index lists",
    "other safetensors files": "all of them",
}
REFUSED: Mapping[str, str] = {
    f"pickles ({', '.join(f'`{kind}`' for kind in _PICKLES)})": "reading one can run code",
    "Git LFS pointers, and links to files that were never downloaded": "the weights are elsewhere",
    "a tensor in two files that both belong to the model": "one of them is wrong",
    "an index that names files outside the folder": "a checkpoint reads only its own folder",
}
_NAMED = 3  # most files listed in a note; the others are counted


def check_folder(folder: Path) -> None:
    """Raise CheckpointError if a folder is not a checkpoint, or is only partly downloaded."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"can't read {folder}: {error.strerror}") from error
    for path in paths:
        if path.suffix in _SMALL_FILES:
            check_downloaded(path)
    if not (folder / CONFIG).exists():
        raise CheckpointError(_not_a_checkpoint(folder, f"has no {CONFIG}"))


def open_weights(
    folder: Path, hf_config: Mapping[str, Any]
) -> tuple[dict[str, SafetensorsFile], tuple[str, ...]]:
    """Every tensor's stored name → its file, and a note about weight files that are not read."""
    read, names = _chosen(folder, hf_config)
    places: dict[str, SafetensorsFile] = {}
    for file in [_open(folder, name, read) for name in names]:
        for tensor in file.tensors:
            if tensor in places:
                raise CheckpointError(
                    f"{folder}: tensor {tensor} is in both {places[tensor].path.name} and "
                    f"{file.path.name}; remove the file that is not part of the model"
                )
            places[tensor] = file
    return places, _left_aside(folder, {read, *names})


def _chosen(folder: Path, hf_config: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The file that decides, for messages, and the names of the safetensors files to read."""
    first = hf_config.get("transformers_weights") or _SINGLE
    if not is_file_name(first):
        raise CheckpointError(f"{folder / CONFIG}: transformers_weights is not a file name")
    for name in (first, _INDEX):
        if _is_listed(folder / name):
            return name, _shards(folder, name) if name.endswith(".index.json") else [name]
    if first != _SINGLE:
        raise CheckpointError(f"{folder}: {CONFIG} names {first}, which is missing; download it")
    names = _present(folder)
    if not names:
        raise CheckpointError(_not_a_checkpoint(folder, "has no .safetensors file"))
    return names[0], names


def _is_listed(path: Path) -> bool:
    """Whether there is such a file, or a broken link to one."""
    return path.is_file() or path.is_symlink()


def _shards(folder: Path, index: str) -> list[str]:
    """transformers reads every tensor of the listed files, so only their names matter."""
    names = read_json(folder / index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{folder / index} has no weight_map; download the folder again")
    return sorted(set(map(str, names.values())))


def _open(folder: Path, name: str, named_by: str) -> SafetensorsFile:
    if not is_file_name(name):
        raise CheckpointError(f"{folder}: {named_by} names {name!r:.80}, outside the folder")
    if not name.endswith(".safetensors"):
        raise CheckpointError(
            f"{folder}: {named_by} names {name!r}, which is not a safetensors file"
        )
    check_downloaded(folder / name)
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder}: shard {name} is missing; download it")
    return SafetensorsFile(folder / name)


def _left_aside(folder: Path, read: set[str]) -> tuple[str, ...]:
    present = _present(folder)
    if (folder / _INDEX).exists():
        present.append(_INDEX)
    left = sorted(set(present) - read)
    if not left:
        return ()
    decides = _INDEX if _INDEX in read else min(read)
    return (f"{folder.name}: the weights are those of {decides}; left aside: {_listed(left)}",)


def _present(folder: Path) -> list[str]:
    """The safetensors files of the model itself, not of an adapter beside it."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    return [name for name in names if name != ADAPTER_WEIGHTS]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _not_a_checkpoint(folder: Path, found: str) -> str:
    """What the folder holds instead of a checkpoint, and what to do."""
    if inner := _checkpoints_inside(folder):
        others = f" ({len(inner)} checkpoints are inside)" if len(inner) > 1 else ""
        return f"{folder} {found}, but {inner[-1]} is a checkpoint; give that folder{others}"
    if any(path for pattern in _PICKLES for path in folder.glob(pattern)):
        return (
            f"{folder} {found}, but pickled weights (.bin, .pt), which can run code when read; "
            "save the model again as safetensors"
        )
    if files := sorted(path.name for path in folder.glob("*.gguf")):
        return f"{folder} {found}, but {_listed(files)}; give one of the GGUF files instead"
    return f"{folder} {found}; expected a Hugging Face checkpoint folder"


def _checkpoints_inside(folder: Path) -> list[Path]:
    """Folders of checkpoints below this one, by their steps: the newest of a trainer is last."""
    inside = [
        path.parent
        for pattern in ("*", "snapshots/*")
        for name in (CONFIG, ADAPTER_CONFIG)
        for path in folder.glob(f"{pattern}/{name}")
    ]
    return sorted(set(inside), key=_step)


def _step(path: Path) -> tuple[int, str]:
    number = re.search(r"(\d{1,9})$", path.name)
    return (int(number[1]) if number else -1, path.name)
