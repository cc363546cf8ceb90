"""`gemma-export push`: uploads a bundle to the Hugging Face hub, with a model card.

Files are uploaded one by one and committed together at the end, so nobody sees half a bundle.
The hub keeps an uploaded file by its digest: a push that was cut off skips it the next time.
"""

import sys
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_runtime.errors import HubError

if TYPE_CHECKING:  # --help starts fast
    from collections.abc import Iterator

    from huggingface_hub import CommitOperationAdd, HfApi

    from gemma_runtime.bundle import Bundle
    from gemma_runtime.measure.bench import Benchmark

# A path to read, or the content itself.
Files = Mapping[str, Path | bytes]


def push(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="The repository; created if needed.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Everybody may see it. \\[private]")
    ] = False,
    bench: Annotated[
        Path | None,
        typer.Option(help="Output of gemma-runtime bench --json, for the card's speed table."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the card and the files; contact nothing.")
    ] = False,
) -> None:
    """Upload a bundle to the Hugging Face hub, with a model card made from its manifest.

    Checks the bundle's digests first. If a push is cut off, run it again: files that arrived are
    not sent again.
    """
    from gemma_export.model_card import write_card
    from gemma_runtime.bundle import open_bundle

    repo_id = _repo_id(repository)
    bundle = open_bundle(folder)
    benchmark = _read_benchmark(bench, bundle) if bench else None
    files = _files_of(bundle, write_card(bundle, repo_id, benchmark))
    if dry_run:
        _print_plan(files, repo_id, public)
    else:
        print(push_files(files, repo_id, public))


def push_files(files: Files, repo_id: str, public: bool) -> str:
    """Upload files as one commit. Returns the commit's URL."""
    from gemma_runtime.hub import has_token, require_hub

    require_hub("hub")
    from huggingface_hub import CommitOperationAdd, HfApi

    if not has_token():
        raise HubError(
            "no token is set; run `hf auth login` with a token that can write, then push again"
        )
    api = HfApi()
    with _one_line_errors(repo_id):
        _create(api, repo_id, public)
        additions = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        _upload(api, repo_id, additions)
        commit = api.create_commit(repo_id, additions, commit_message="Upload the bundle")
    return str(commit.commit_url)


def _repo_id(text: str) -> str:
    from gemma_runtime.hub import parse_hub_name

    name = parse_hub_name(text)
    if name is None or name.revision is not None:
        raise HubError(f"{text!r} is not the name of a repository; expected owner/name")
    return name.repo_id


def _read_benchmark(path: Path, bundle: "Bundle") -> "Benchmark":
    """The figures of this bundle. Raises BundleError if the file holds others."""
    import msgspec

    from gemma_runtime.errors import BundleError
    from gemma_runtime.formats.json_bytes import decode_json
    from gemma_runtime.measure.bench import Benchmark

    try:
        benchmark = decode_json(path.read_bytes(), Benchmark)
    except (OSError, msgspec.DecodeError) as error:
        raise BundleError(
            f"can't read {path}: {error}; expected the output of gemma-runtime bench --json"
        ) from error
    manifest = bundle.manifest
    wanted = (manifest.model.id, manifest.quantization.recipe, manifest.target.name)
    measured = [(each.model, each.recipe, each.target) for each in benchmark.bundles]
    if measured != [wanted]:
        raise BundleError(
            f"{path} measures {'; '.join(' '.join(each) for each in measured)}, expected only "
            f"{' '.join(wanted)}; run gemma-runtime bench --json with this bundle alone"
        )
    return benchmark


def _files_of(bundle: "Bundle", card: str) -> Files:
    """Every file of the repository: the manifest's files and its signature, nothing else."""
    from gemma_export.model_card import NOTICE, has_terms
    from gemma_runtime.bundle import MANIFEST, SIGNATURE

    names = [*bundle.manifest.files, MANIFEST]
    if (bundle.directory / SIGNATURE).is_file():
        names.append(SIGNATURE)
    files = {name: bundle.directory / name for name in names}
    notice = {"NOTICE": NOTICE.encode()} if has_terms(bundle.manifest) else {}
    return {"README.md": card.encode(), **notice, **files}


def _print_plan(files: Files, repo_id: str, public: bool) -> None:
    from gemma_runtime.machine import format_bytes

    sys.stdout.write(f"{_content(files['README.md'])}\n")
    print(f"{'public' if public else 'private'} repository {repo_id}:")
    for name, content in files.items():
        print(f"  {name}  {format_bytes(_size(content))}")


def _content(content: Path | bytes) -> str:
    return (content if isinstance(content, bytes) else content.read_bytes()).decode()


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _create(api: "HfApi", repo_id: str, public: bool) -> None:
    """Create the repository, or check that the existing one is a bundle with this visibility."""
    api.create_repo(repo_id, private=not public, exist_ok=True)
    info = api.model_info(repo_id)
    names = {file.rfilename for file in info.siblings or ()} - {".gitattributes"}
    if names and "manifest.json" not in names:
        raise HubError(
            f"{repo_id} exists and is not a bundle: it holds {min(names)} but no manifest.json; "
            "choose another name"
        )
    if bool(info.private) == public:
        has, flag = ("private", "leave --public out") if public else ("public", "pass --public")
        raise HubError(f"{repo_id} exists and is {has}; {flag}, or choose another name")


def _upload(api: "HfApi", repo_id: str, additions: "list[CommitOperationAdd]") -> None:
    from gemma_runtime.machine import format_bytes

    for index, addition in enumerate(additions, 1):
        size = format_bytes(addition.upload_info.size)
        print(f"{index}/{len(additions)} {addition.path_in_repo}, {size}", file=sys.stderr)
        api.preupload_lfs_files(repo_id, [addition], free_memory=False)


@contextmanager
def _one_line_errors(repo_id: str) -> "Iterator[None]":
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(_explain(repo_id, error)) from error


def _explain(repo_id: str, error: Exception) -> str:
    from huggingface_hub import errors

    from gemma_runtime.hub import causes, root_reason

    for cause in causes(error):
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE forbids uploads; unset it, then push again"
        if isinstance(cause, errors.HfHubHTTPError):
            return _refused(repo_id, cause.response.status_code)
    return (
        f"can't push to {repo_id} ({root_reason(error)}); check the network, then push again: "
        "files that arrived are not sent again"
    )


def _refused(repo_id: str, status: int) -> str:
    if status == 401:
        return (
            f"the hub refused your token for {repo_id} (401); run `hf auth login` with a token "
            "that can write, then push again"
        )
    if status in (403, 404):
        return (
            f"your token may not write to {repo_id} ({status}); use a token that can write there, "
            "or your own account as the owner"
        )
    return f"the hub answered {status} for {repo_id}; push again later"
