"""Chooses a GGUF model of a folder or of a hub repository."""

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from gemma_export.checkpoint.adapter_folder import is_adapter
from gemma_export.formats.downloaded import starts_with
from gemma_export.formats.gguf_parts import first_part
from gemma_runtime.errors import CheckpointError

_LISTED = 12  # names in a question; the others are counted
_NOT_MODELS = ("mmproj", "imatrix")  # vision projectors and calibration data


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF, by suffix or by its first bytes: Ollama's blobs have no suffix."""
    return path.is_file() and (path.suffix == ".gguf" or starts_with(path, b"GGUF"))


def find_gguf(folder: Path) -> Path | None:
    """The GGUF model of a folder without safetensors or adapter; None if it has none.

    Raises CheckpointError with the list if it has several.
    """
    if any(folder.glob("*.safetensors")) or is_adapter(folder):
        return None
    names = models(path.name for path in folder.glob("*.gguf"))
    if not names:
        return None
    if len(names) > 1:
        raise CheckpointError(
            f"{folder} has {len(names)} GGUF models: {listed(names)}; give one of these files"
        )
    return folder / names[0]


def choose(repo_id: str, names: Iterable[str], pattern: str) -> str:
    """The one model of a repository that a pattern matches; parts count as one.

    A pattern is a file name, a part of one, e.g. Q4_K_M, or has wildcards. Case doesn't matter.
    Raises CheckpointError with the list if none or several match.
    """
    known = models(names)
    found = [name for name in known if matches(name, pattern)]
    exact = [name for name in found if _tagged(name, pattern)]
    chosen = exact if len(exact) == 1 else found
    if len(chosen) == 1:
        return chosen[0]
    question = f"{repo_id} has {len(known)} GGUF models"
    if pattern:
        question = f"{repo_id}: {pattern!r:.60} matches {len(found)} of {len(known)} GGUF models"
    raise CheckpointError(
        f"{question}: {listed(chosen or known)}; which one? Give --checkpoint {repo_id}:PATTERN, "
        "e.g. :Q4_0"
    )


def models(names: Iterable[str]) -> list[str]:
    """The first parts of all models among the names."""
    return sorted(
        name
        for name in names
        if name.endswith(".gguf")
        and first_part(PurePosixPath(name).name) == PurePosixPath(name).name
        and not PurePosixPath(name).name.lower().startswith(_NOT_MODELS)
    )


def matches(name: str, pattern: str) -> bool:
    name, pattern = name.lower(), pattern.lower()
    if any(sign in pattern for sign in "*?["):
        return fnmatch(name, pattern) or fnmatch(PurePosixPath(name).name, pattern)
    return pattern in name


def listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _tagged(name: str, pattern: str) -> bool:
    """Whether a name is the pattern, or ends with it: Q4_K matches Q4_K_M too, but less well."""
    stem = PurePosixPath(name.lower()).name.removesuffix(".gguf").partition("-00001-of-")[0]
    wanted = pattern.lower().removesuffix(".gguf")
    return stem == wanted or stem.endswith(("-" + wanted, "." + wanted, "_" + wanted))
