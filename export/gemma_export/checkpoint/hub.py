"""Gets checkpoints from the Hugging Face hub: first from the local cache, then the network.

Downloads only the files that an export reads: configuration, tokenizer and safetensors, never
pickles or code. Every failure becomes one line with its reason and what to do.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemma_runtime.errors import HubError, MissingExtra

_INDEX = "model.safetensors.index.json"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_FILES = (
    "adapter_config.json",
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
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_PATH_LIKE = (".gguf", ".safetensors", ".json", ".bin", ".pt")


@dataclass(frozen=True, slots=True)
class HubSnapshot:
    folder: Path
    revision: str  # the commit


def looks_like_hub_id(text: str) -> bool:
    """Whether a string could be a hub id, `owner/name`, rather than a path."""
    return (
        _HUB_ID.fullmatch(text) is not None
        and not text.endswith(_PATH_LIKE)
        and "--" not in text
        and ".." not in text
    )


def fetch_hub(repo_id: str, revision: str | None = None) -> HubSnapshot:
    """The snapshot of a repository. Makes no request if the cache has a complete one.

    Raises HubError if the repository is gated or unknown, no token is set, or the hub unreachable.
    """
    try:
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    except ImportError as error:
        raise MissingExtra("huggingface_hub", "export") from error

    if (cached := _cached(repo_id, revision)) is not None:
        return cached
    try:
        folder = _snapshot(repo_id, revision)
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(_explain(repo_id, revision, error)) from error
    if not _has_weights(folder) and not _has_adapter(folder):
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
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = _snapshot(repo_id, revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    complete = _has_weights(folder) and has_tokenizer
    return HubSnapshot(folder, folder.name) if complete or _has_adapter(folder) else None


def _snapshot(repo_id: str, revision: str | None, local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(_FILES),
            local_files_only=local_files_only,
        )
    )


def _has_weights(folder: Path) -> bool:
    if not (folder / "config.json").exists():
        return False
    if (folder / "model.safetensors").exists():
        return True
    if not (folder / _INDEX).exists():
        shards = list(folder.glob("*.safetensors"))
        return bool(shards) and all(path.exists() and "-of-" not in path.name for path in shards)
    try:
        shards_of = json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"].values()
    except (ValueError, KeyError):
        return False  # a damaged index names no shards
    return all((folder / str(shard)).exists() for shard in shards_of)


def _has_adapter(folder: Path) -> bool:
    """Whether it has a LoRA adapter, whose base is another repository."""
    return all((folder / name).exists() for name in _ADAPTER)


def _explain(repo_id: str, revision: str | None, error: Exception) -> str:
    """One line: the reason of a failure, and what to do.

    Also tests the causes, because huggingface_hub wraps most errors in a LocalEntryNotFoundError.
    """
    from huggingface_hub import errors

    for cause in _causes(error):
        if isinstance(cause, errors.GatedRepoError):  # before its base class
            return _gated(repo_id)
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"{repo_id} has no revision {revision or 'main'!r}; give a branch, tag or commit"
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return (
                f"{repo_id} is not in the cache and HF_HUB_OFFLINE forbids downloads; unset it, "
                "or download the model elsewhere and pass --checkpoint DIR"
            )
        if isinstance(cause, errors.HfHubHTTPError):
            return _refused(repo_id, cause.response.status_code)
        if isinstance(cause, errors.HFValidationError):
            return f"{repo_id!r} is not a hub id; expected owner/name"
    return _unreachable(repo_id, error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its chain of causes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _gated(repo_id: str) -> str:
    licence = f"accept its licence at https://huggingface.co/{repo_id}"
    if _has_token():
        return f"{repo_id} is gated and your token has no access; {licence}, then retry"
    return f"{repo_id} is gated and no token is set; {licence}, run `hf auth login`, then retry"


def _refused(repo_id: str, status: int) -> str:
    """Explain a status code. Without a token, 401 means private, gated or nonexistent."""
    if status == 401 and not _has_token():
        return (
            f"{repo_id} is private, gated or does not exist, and no token is set; check the name, "
            "run `hf auth login`, then retry"
        )
    if status in (401, 403):
        return (
            f"the hub refused your token for {repo_id} ({status}); run `hf auth login` with a "
            "token that can read it, then retry"
        )
    if status == 404:
        return f"{repo_id} does not exist on the hub; check the name (owner/name)"
    return (
        f"the hub answered {status} for {repo_id}; retry later, or download it elsewhere and pass "
        "--checkpoint DIR"
    )


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _unreachable(repo_id: str, error: Exception) -> str:
    root = list(_causes(error))[-1]
    reason = (str(root).splitlines() or [""])[0].strip() or type(root).__name__
    return (
        f"can't fetch {repo_id} ({reason}); check the network and the disk, or download it "
        "elsewhere and pass --checkpoint DIR"
    )
