"""Names, snapshots and failures of the Hugging Face hub, and bundles given as `hub:OWNER/NAME`.

Only text that starts with `hub:`, and gemma-export's own commands, lead here. Every failure becomes
one line with its reason and what to do.
"""

import glob
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from gemma_runtime.errors import HubError, MissingExtra
from gemma_runtime.formats.names import stays_inside

HUB_PREFIX = "hub:"
_MANIFEST = "manifest.json"
_SIGNATURE = f"{_MANIFEST}.minisig"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_PATH_LIKE = (".gguf", ".safetensors", ".json", ".bin", ".pt")
_HOST = re.compile(r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/", re.IGNORECASE)
_EXPECTED = "expected owner/name or https://huggingface.co/owner/name[/tree/REVISION]"


@dataclass(frozen=True, slots=True)
class HubName:
    repo_id: str  # owner/name
    revision: str | None = None  # branch, tag or commit; None: the default branch


def looks_like_hub_id(text: str) -> bool:
    """Whether a string could be a hub id, `owner/name`, rather than a path."""
    return (
        _ID.fullmatch(text) is not None
        and not text.endswith(_PATH_LIKE)
        and "--" not in text
        and ".." not in text
    )


def parse_hub_name(text: str) -> HubName | None:
    """Read `owner/name` or the URL of a repository; None if it is neither.

    Raises HubError for a URL of the hub that is not the page of a model repository.
    """
    if (host := _HOST.match(text)) is None:
        return HubName(text) if looks_like_hub_id(text) else None
    path = re.split(r"[?#]", text[host.end() :])[0].strip("/")
    owner, name, *rest = path.split("/") if "/" in path else (path, "")
    repo_id, revision = f"{owner}/{name}", _tree_revision(rest)
    if owner in ("datasets", "spaces") or not looks_like_hub_id(repo_id) or revision is None:
        raise HubError(f"{text} is not the page of a model on the hub; {_EXPECTED}")
    return HubName(repo_id, revision or None)


def _tree_revision(rest: list[str]) -> str | None:
    """The revision after `/tree/`; "" if there is none, None if this is another kind of page."""
    if not rest:
        return ""
    is_ref = rest[1:2] == ["refs"] and len(rest) == 4  # refs/pr/1
    if rest[0] != "tree" or not (len(rest) == 2 or is_ref):
        return None
    return unquote("/".join(rest[1:]))


def fetch_bundle(name: str) -> Path:
    """The folder of a bundle on the hub, `owner/name[@REVISION]`, in Hugging Face's cache.

    Makes no request if the cache has the whole bundle. The files are not checked here:
    `open_bundle` does that.
    """
    address = bundle_name(name)
    repo_id, revision = address.repo_id, address.revision
    require_hub("hub")
    cached = cached_snapshot(repo_id, revision, [_MANIFEST])
    if cached is not None and _is_whole(cached):
        return cached
    return _download_bundle(repo_id, revision)


def bundle_name(name: str) -> HubName:
    """Read `owner/name[@REVISION]`, or the URL of a repository. The phone apps read the same.

    Raises HubError.
    """
    text, _, revision = name.partition("@")
    parsed = parse_hub_name(text)
    if parsed is None:
        raise HubError(f"{text!r} is not a hub id; expected hub:owner/name[@REVISION]")
    return HubName(parsed.repo_id, revision or parsed.revision)


def _download_bundle(repo_id: str, revision: str | None) -> Path:
    """Download the manifest, then the files that it lists, all of one commit."""
    instead = "give the bundle's folder"
    if _MANIFEST not in list_files(repo_id, revision, instead):
        raise HubError(
            f"{repo_id} has no {_MANIFEST}, so it is not a bundle; expected a repository written "
            "by gemma-export push"
        )
    folder = download_snapshot(repo_id, revision, [_MANIFEST, _SIGNATURE], instead)
    patterns = [_MANIFEST, *(glob.escape(file) for file in _files(folder))]
    return download_snapshot(repo_id, folder.name, patterns, instead)


def _is_whole(folder: Path) -> bool:
    if not (folder / _MANIFEST).exists():
        return False
    return all((folder / file).exists() for file in _files(folder))


def _files(folder: Path) -> list[str]:
    """The files that the manifest lists; none if it can't be read: `open_bundle` says why."""
    try:
        return [str(name) for name in json.loads((folder / _MANIFEST).read_bytes())["files"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def require_hub(extra: str) -> None:
    """Raise MissingExtra if huggingface_hub is not installed."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise MissingExtra("huggingface_hub", extra) from error


def cached_snapshot(repo_id: str, revision: str | None, patterns: list[str]) -> Path | None:
    """The snapshot in the local cache, which may lack files; None if there is none."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return _snapshot(repo_id, revision, patterns, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def download_snapshot(
    repo_id: str, revision: str | None, patterns: list[str], instead: str
) -> Path:
    """Download the files that match. Raises HubError, which ends with `instead`."""
    with _one_line_errors(repo_id, revision, instead):
        return _snapshot(repo_id, revision, patterns)


def list_files(repo_id: str, revision: str | None, instead: str) -> list[str]:
    """The names of all files on the hub. Raises HubError, which ends with `instead`."""
    from huggingface_hub import HfApi

    with _one_line_errors(repo_id, revision, instead):
        info = HfApi().model_info(repo_id, revision=revision)
    names = [file.rfilename for file in info.siblings or ()]
    return [name for name in names if stays_inside(name)]


@contextmanager
def _one_line_errors(repo_id: str, revision: str | None, instead: str) -> Iterator[None]:
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(_explain(repo_id, revision, error, instead)) from error


def _snapshot(
    repo_id: str, revision: str | None, patterns: list[str], local_files_only: bool = False
) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=patterns,
            local_files_only=local_files_only,
        )
    )


def _explain(repo_id: str, revision: str | None, error: Exception, instead: str) -> str:
    """One line: the reason of a failure, and what to do.

    Also tests the causes, because huggingface_hub wraps most errors in a LocalEntryNotFoundError.
    """
    from huggingface_hub import errors

    for cause in causes(error):
        if isinstance(cause, errors.GatedRepoError):  # before its base class
            return _gated(repo_id)
        if isinstance(cause, errors.RevisionNotFoundError):
            return f"{repo_id} has no revision {revision or 'main'!r}; give a branch, tag or commit"
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return (
                f"{repo_id} is not in the cache and HF_HUB_OFFLINE forbids downloads; unset it, "
                f"or download the model elsewhere and {instead}"
            )
        if isinstance(cause, errors.HfHubHTTPError):
            return _refused(repo_id, cause.response.status_code, instead)
        if isinstance(cause, errors.HFValidationError):
            return f"{repo_id!r} is not a hub id; expected owner/name"
    return (
        f"can't fetch {repo_id} ({root_reason(error)}); check the network and the disk, or "
        f"download it elsewhere and {instead}"
    )


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its chain of causes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def root_reason(error: Exception) -> str:
    """The first line of the first cause."""
    root = list(causes(error))[-1]
    return (str(root).splitlines() or [""])[0].strip() or type(root).__name__


def _gated(repo_id: str) -> str:
    licence = f"accept its licence at https://huggingface.co/{repo_id}"
    if has_token():
        return f"{repo_id} is gated and your token has no access; {licence}, then retry"
    return f"{repo_id} is gated and no token is set; {licence}, run `hf auth login`, then retry"


def _refused(repo_id: str, status: int, instead: str) -> str:
    """Explain a status code. Without a token, 401 means private, gated or nonexistent."""
    if status == 401 and not has_token():
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
        f"the hub answered {status} for {repo_id}; retry later, or download it elsewhere and "
        f"{instead}"
    )


def has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
