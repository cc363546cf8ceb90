"""Gets checkpoints from the Hugging Face hub: first from the local cache, then the network.

Downloads only the files that an export reads: configuration, tokenizer and safetensors, or one GGUF
model, never pickles or code. Every failure becomes one line with its reason and what to do.
"""

from dataclasses import dataclass
from pathlib import Path

from gemma_export.checkpoint.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from gemma_export.formats.json_file import read_json
from gemma_export.model.hf_config import config_from_hf
from gemma_runtime.errors import CheckpointError, ConfigError, HubError
from gemma_runtime.formats.names import is_file_name
from gemma_runtime.hub import cached_snapshot, download_snapshot, list_files, require_hub

_INDEX = "model.safetensors.index.json"
_MODULES = "modules.json"  # of sentence-transformers
_ADAPTER = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_FILES = [
    ADAPTER_CONFIG,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "processor_config.json",
    "*.safetensors",
    _INDEX,
    _MODULES,
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "*_Pooling/config.json",
    "*_Dense/config.json",  # with weights that `*.safetensors` matches
]
_INSTEAD = "pass --checkpoint DIR"


@dataclass(frozen=True, slots=True)
class HubSnapshot:
    folder: Path
    revision: str  # the commit
    gguf: str | None = None  # the chosen GGUF model, if it is not a folder of safetensors


def fetch_hub(repo_id: str, revision: str | None = None, pattern: str = "") -> HubSnapshot:
    """The snapshot of a repository. Makes no request if the cache has a complete one.

    `pattern` chooses one of its GGUF models. Without a pattern, and without safetensors, the
    repository must have a single one. Raises CheckpointError if the choice is not clear, and
    HubError if the repository is gated or unknown, no token is set, or the hub unreachable.
    """
    require_hub("export")
    cached = _cached_gguf(repo_id, revision, pattern) if pattern else _cached(repo_id, revision)
    if cached is not None:
        return cached
    folder = None if pattern else download_snapshot(repo_id, revision, _FILES, _INSTEAD)
    if folder is None or not (_has_weights(folder) or _has_adapter(folder)):
        model = _fetch_gguf(repo_id, revision, pattern)
        if model is not None:
            return model
        raise HubError(
            f"{repo_id}: config.json or a .safetensors file is missing on the hub and in the "
            "cache, and there is no GGUF model; choose a repository that has them, or pass "
            "--checkpoint DIR"
        )
    return HubSnapshot(folder, folder.name)


def _cached(repo_id: str, revision: str | None) -> HubSnapshot | None:
    """The snapshot in the local cache, or None if it lacks a file that an export needs.

    transformers leaves snapshots without a tokenizer there, or of an encoder without its modules;
    interrupted downloads leave snapshots without some shards.
    """
    folder = cached_snapshot(repo_id, revision, _FILES)
    if folder is None:
        return None
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    complete = _has_weights(folder) and has_tokenizer and not _lacks_modules(folder)
    return HubSnapshot(folder, folder.name) if complete or _has_adapter(folder) else None


def _cached_gguf(repo_id: str, revision: str | None, pattern: str) -> HubSnapshot | None:
    """The GGUF model in the cache that a pattern matches; None unless there is one, whole."""
    from gemma_export.checkpoint.gguf_choice import matches, models
    from gemma_export.formats.gguf_parts import part_names

    # No patterns: the folder, without a check that the repository's other files are in it.
    folder = cached_snapshot(repo_id, revision, [])
    if folder is None:
        return None
    known = models(path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf"))
    found = [name for name in known if matches(name, pattern)]
    if len(found) != 1 or not all((folder / part).exists() for part in part_names(found[0])):
        return None
    return HubSnapshot(folder, folder.name, found[0])


def _fetch_gguf(repo_id: str, revision: str | None, pattern: str) -> HubSnapshot | None:
    """Download one GGUF model with all its parts; None if the repository has none."""
    from gemma_export.checkpoint.gguf_choice import choose, models
    from gemma_export.formats.gguf_parts import part_names

    names = list_files(repo_id, revision, _INSTEAD)
    if not models(names):
        return None
    name = choose(repo_id, names, pattern)
    folder = download_snapshot(repo_id, revision, list(part_names(name)), _INSTEAD)
    return HubSnapshot(folder, folder.name, name)


def _has_weights(folder: Path) -> bool:
    if not (folder / "config.json").exists():
        return False
    if (folder / "model.safetensors").exists():
        return True
    if not (folder / _INDEX).exists():
        shards = list(folder.glob("*.safetensors"))
        return bool(shards) and all(path.exists() and "-of-" not in path.name for path in shards)
    try:
        named = read_json(folder / _INDEX).get("weight_map")
    except CheckpointError:
        return False  # a damaged index names no shards
    return isinstance(named, dict) and all(
        is_file_name(shard) and (folder / shard).is_file() for shard in named.values()
    )


def _lacks_modules(folder: Path) -> bool:
    """Whether it is of an encoder, without what makes vectors of its states."""
    if (folder / _MODULES).exists():
        return False
    try:
        return config_from_hf(read_json(folder / "config.json")).is_encoder
    except (CheckpointError, ConfigError):
        return False  # whoever opens the folder says what is wrong with it


def _has_adapter(folder: Path) -> bool:
    """Whether it has a LoRA adapter, whose base is another repository."""
    return all((folder / name).exists() for name in _ADAPTER)
