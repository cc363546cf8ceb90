"""Where what can be made again is kept: stores, and the assembled demo weights."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$GEMMA_EXPORT_CACHE, else gemma-export below $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("GEMMA_EXPORT_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "gemma-export"
