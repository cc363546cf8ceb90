"""Reads the JSON objects of a checkpoint: configs, indexes and token lists."""

import json
from pathlib import Path
from typing import Any

from gemma_export.formats.downloaded import check_downloaded
from gemma_runtime.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError if the file is missing, damaged or another value."""
    check_downloaded(path)
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content
