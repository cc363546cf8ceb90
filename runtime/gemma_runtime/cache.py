"""The cache folder: what exports and sessions keep for the next ones.

Quantized stores, calibrations, teachers, packed weights, compiled runners, demo weights: everything
in it can be rebuilt.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from gemma_runtime.errors import CacheError

ABOUT = "about.json"  # describes a folder of the cache
PACKED = "packed"  # the folder of packed weights
TEACHERS = "teachers"  # the folder of teachers' probabilities


@dataclass(frozen=True, slots=True)
class About:
    """What a folder of the cache was made from; shown by `gemma-export cache list`."""

    model: str
    recipe: str
    calibration: str


def cache_folder() -> Path:
    """$GEMMA_EXPORT_CACHE, else `gemma-export` in the system's cache folder.

    That is $XDG_CACHE_HOME or ~/.cache on Linux, ~/Library/Caches on macOS and %LOCALAPPDATA% on
    Windows.
    """
    if own := os.environ.get("GEMMA_EXPORT_CACHE"):
        return Path(own)
    return user_cache_path("gemma-export", appauthor=False)


def writable_cache() -> Path:
    """Create the cache folder if needed. Raises CacheError if it is not writable."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise CacheError(
            f"can't write to the cache folder {folder}: {error.strerror or error}; set "
            "GEMMA_EXPORT_CACHE to a writable folder"
        ) from error
