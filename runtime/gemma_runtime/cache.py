"""The cache folder: quantized stores, calibrations, compiled runners, assembled demo weights.

All of it can be made again.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from gemma_runtime.errors import CacheError

ABOUT = "about.json"  # in a folder of the cache: what it was made from


@dataclass(frozen=True, slots=True)
class About:
    """What a folder of the cache was made from, for people."""

    model: str
    recipe: str
    calibration: str


def cache_folder() -> Path:
    """$GEMMA_EXPORT_CACHE, else the system's place for caches.

    That is gemma-export below $XDG_CACHE_HOME or ~/.cache on Linux, below ~/Library/Caches on
    macOS, and below %LOCALAPPDATA% on Windows.
    """
    if own := os.environ.get("GEMMA_EXPORT_CACHE"):
        return Path(own)
    return user_cache_path("gemma-export", appauthor=False)


def writable_cache() -> Path:
    """The cache folder, created; raises CacheError if nothing can be written there."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise CacheError(
            f"can't write to the cache folder {folder}: {error.strerror or error}; set "
            "GEMMA_EXPORT_CACHE to a folder that can be written"
        ) from error
