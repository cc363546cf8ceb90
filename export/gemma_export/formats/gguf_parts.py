"""Reads a model that llama-gguf-split has split into `NAME-00001-of-0000N.gguf` as one file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma_export.formats.gguf_file import read_header
from gemma_runtime.errors import CheckpointError
from gemma_runtime.formats.gguf import GgufHeader

_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_MOST_PARTS = 1000


@dataclass(frozen=True, slots=True)
class GgufModel:
    """All tensors of a model, and the file of each."""

    header: GgufHeader  # the first part's metadata
    files: Mapping[str, Path]  # tensor → its file

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(self.files.values()))


def first_part(name: str) -> str:
    """The name of the first part of the model that a file is part of; other names as they are."""
    match = _PART.fullmatch(name)
    return f"{match[1]}-00001-of-{match[3]}.gguf" if match else name


def part_names(name: str) -> list[str]:
    """The names of all parts of the model that a file is part of, or the name alone."""
    match = _PART.fullmatch(name)
    if not match or not 1 <= int(match[3]) <= _MOST_PARTS:
        return [name]
    return [f"{match[1]}-{i + 1:05}-of-{match[3]}.gguf" for i in range(int(match[3]))]


def read_model(path: Path) -> GgufModel:
    """Read the header of a file, or of all parts if it is one of several.

    Raises CheckpointError, e.g. for a missing part or parts of different models.
    """
    header = read_header(path)
    count = _count(path, header)
    if count == 1:
        return GgufModel(header, dict.fromkeys(header.tensors, path))
    headers = {part: _read_part(part, index, count) for index, part in _parts(path, count)}
    files = {name: part for part, found in headers.items() for name in found.tensors}
    first = next(iter(headers.values()))
    expected = first.metadata.get("split.tensors.count", len(files))
    if len(files) != expected or len(files) != sum(len(h.tensors) for h in headers.values()):
        raise CheckpointError(
            f"{path}: its {count} parts have {len(files)} different tensors, the first part says "
            f"{expected!r:.20}; download all parts of one model again"
        )
    tensors = {name: found.tensors[name] for found in headers.values() for name in found.tensors}
    return GgufModel(GgufHeader(first.metadata, tensors), files)


def _count(path: Path, header: GgufHeader) -> int:
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or not 0 <= count <= _MOST_PARTS:
        raise CheckpointError(f"{path}: split.count is {count!r:.40}, expected a number of parts")
    return max(1, count)


def _parts(path: Path, count: int) -> list[tuple[int, Path]]:
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts of a model, expected a name like "
            f"MODEL-00001-of-{count:05}.gguf beside the other parts; rename them, or join them: "
            "llama-gguf-split --merge FIRST_PART OUTPUT"
        )
    return [(index, path.with_name(name)) for index, name in enumerate(part_names(path.name))]


def _read_part(part: Path, index: int, count: int) -> GgufHeader:
    if not part.is_file():
        raise CheckpointError(f"{part} is missing, part {index + 1} of {count}; download it")
    header = read_header(part)
    found = (header.metadata.get("split.no"), header.metadata.get("split.count"))
    if found != (index, count):
        raise CheckpointError(
            f"{part}: split.no and split.count are {found!r:.40}, expected {(index, count)}; "
            "download this part again"
        )
    return header
