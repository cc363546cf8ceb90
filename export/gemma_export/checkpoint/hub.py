"""Gets checkpoints from the Hugging Face hub: first from the local cache, then the network.

Downloads only the files that an export reads: configuration, tokenizer and safetensors, never
pickles or code. Every failure becomes one line with its reason and what to do.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from gemma_runtime.errors import HubError
from gemma_runtime.hub import cached_snapshot, download_snapshot, require_hub

_INDEX = "model.safetensors.index.json"
_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "*.safetensors",
    _INDEX,
]


@dataclass(frozen=True, slots=True)
class HubSnapshot:
    folder: Path
    revision: str  # the commit


def fetch_hub(repo_id: str, revision: str | None = None) -> HubSnapshot:
    """The snapshot of a repository. Makes no request if the cache has a complete one.

    Raises HubError if the repository is gated or unknown, no token is set, or the hub unreachable.
    """
    require_hub("export")
    if (cached := _cached(repo_id, revision)) is not None:
        return cached
    folder = download_snapshot(repo_id, revision, _FILES, "pass --checkpoint DIR")
    if not _has_weights(folder):
        raise HubError(
            f"{repo_id}: config.json or a .safetensors file is missing on the hub and in the "
            "cache; choose a repository that has them, or pass --checkpoint DIR"
        )
    return HubSnapshot(folder, folder.name)


def _cached(repo_id: str, revision: str | None) -> HubSnapshot | None:
    """The snapshot in the local cache, or None if it lacks a file that an export needs.

    transformers leaves snapshots without a tokenizer there; interrupted downloads leave snapshots
    without some shards.
    """
    folder = cached_snapshot(repo_id, revision, _FILES)
    if folder is None or not _has_weights(folder) or not (folder / "tokenizer.json").exists():
        return None
    return HubSnapshot(folder, folder.name)


def _has_weights(folder: Path) -> bool:
    if not (folder / "config.json").exists():
        return False
    if not (folder / _INDEX).exists():
        shards = list(folder.glob("*.safetensors"))
        return bool(shards) and not any("-of-" in path.name for path in shards)
    try:
        shards_of = json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"].values()
    except (ValueError, KeyError):
        return False  # a damaged index names no shards
    return all((folder / str(shard)).exists() for shard in shards_of)
