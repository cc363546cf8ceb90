"""Reads and writes bundles: folders with a `manifest.json` that lists every file's digest."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gemma_runtime.errors import BundleError
from gemma_runtime.formats.names import stays_inside
from gemma_runtime.manifest import File, Manifest
from gemma_runtime.manifest_sizes import check_sizes
from gemma_runtime.staging import sweep_leftovers

MANIFEST = "manifest.json"
SIGNATURE = f"{MANIFEST}.minisig"  # of the manifest, if the bundle is signed


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened folder. All paths in its manifest are inside the folder."""

    directory: Path
    manifest: Manifest

    def path(self, role: str) -> Path:
        """The file of a role, e.g. `tokenizer`. Raises BundleError if there is none."""
        return find_role(self.directory, self.manifest.roles, role)

    def digest(self) -> str:
        """sha256 of the manifest, which has the digests of all files."""
        return digest_of_manifest(self.directory)


def open_bundle(directory: Path | str) -> Bundle:
    """Open a bundle. Raises BundleError unless its schema is known and all files match."""
    directory = Path(directory)
    manifest = Manifest.from_json(read_manifest(directory))
    check_sizes(manifest)
    check_files(directory, manifest.files, {*manifest.graph_files(), *manifest.roles.values()})
    return Bundle(directory, manifest)


def check_files(directory: Path, files: Mapping[str, File], used: AbstractSet[str]) -> None:
    """Raise BundleError unless all files match, and those that are used are among them."""
    if unlisted := sorted(used - files.keys()):
        raise BundleError(f"{directory}: manifest.json uses {unlisted[0]} but has no digest of it")
    for name, file in files.items():
        _check_present(directory, name, file)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: _read_digest(directory / name), files)
        for (name, file), digest in zip(files.items(), digests, strict=True):
            if digest != file.sha256:
                raise BundleError(
                    f"{directory / name} was altered: its sha256 is {digest[:12]}…, the manifest "
                    f"says {file.sha256[:12]}…; copy or export the bundle again"
                )


def find_role(directory: Path, roles: Mapping[str, str], role: str) -> Path:
    """The file of a role. Raises BundleError if there is none."""
    if role not in roles:
        raise BundleError(f"{directory} has no {role}; it has: {', '.join(roles)}")
    return directory / roles[role]


def digest_of_manifest(directory: Path) -> str:
    """sha256 of the manifest, in hex."""
    return hashlib.sha256(read_manifest(directory)).hexdigest()


def describe_files(directory: Path) -> Mapping[str, File]:
    """Digest and size of every file below `directory` except the manifest, by POSIX path."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): File(sha256_file(path), path.stat().st_size)
        for path in paths
        if path.relative_to(directory).as_posix() != MANIFEST
    }


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def staged_folder(output: Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill, then rename it to `output`; delete it if the block fails.

    Raises BundleError if `output` exists, unless `force` is set: then it is replaced at the end.
    Also deletes what killed processes left behind.
    """
    check_writable(output, force)
    was_empty = _is_empty_folder(output)
    sweep_leftovers(output.parent, f".{output.name}")
    stage = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        stage.mkdir(parents=True)
        yield stage
        if was_empty and _is_empty_folder(output):
            output.rmdir()
        _replace(stage, output, force)
    except OSError as error:
        raise BundleError(f"can't write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_writable(output: Path, force: bool) -> None:
    """Raise BundleError if `output` can't be created, or exists and may not be replaced.

    An empty folder may be: it was made for the bundle.
    """
    is_empty = _is_empty_folder(output)
    if output.exists() and not force and not is_empty:
        raise BundleError(f"{output} exists; give another --output, or --force to replace it")
    if output.exists() and not is_empty and not (output / MANIFEST).exists():
        raise BundleError(f"{output} is not a bundle, so --force does not replace it; remove it")
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir():
        raise BundleError(f"can't create {output}: {above} is a file; give another --output")
    if not os.access(above, os.W_OK):
        raise BundleError(f"can't write into {above}: permission denied")


def _is_empty_folder(path: Path) -> bool:
    """Whether a bundle can take the place of an empty folder. A link to one stays as it is."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def read_manifest(directory: Path) -> bytes:
    """The bytes of a bundle's manifest. Raises BundleError if the folder has none."""
    try:
        return (directory / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(
            f"{directory} is not a bundle: {MANIFEST}: {error.strerror}; expected a folder "
            "written by gemma-export"
        ) from error


def _check_present(directory: Path, name: str, file: File) -> None:
    path = directory / name
    if not stays_inside(name):
        raise BundleError(f"{directory}: manifest.json names {name!r}, outside the bundle")
    try:
        inside = _is_inside(path.resolve(), directory.resolve())
        present = path.is_file()
        size = path.stat().st_size if present else 0
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before 3.13
        raise _unreadable(path, error) from error
    if not inside:
        raise BundleError(f"{path} is a link that leaves the bundle")
    if not present:
        raise BundleError(f"{path} is missing; copy or export the bundle again")
    if size != file.bytes:
        raise BundleError(
            f"{path} has {size} bytes, the manifest says {file.bytes}; "
            "copy or export the bundle again"
        )


def _is_inside(path: Path, directory: Path) -> bool:
    """Whether a resolved file lies in a resolved bundle.

    A bundle in Hugging Face's cache is `models--…/snapshots/COMMIT`, with links to the files of
    `models--…/blobs`. Those count as inside; other links that leave the folder do not.
    """
    repository = directory.parent.parent
    is_cached = directory.parent.name == "snapshots" and repository.name.startswith("models--")
    return path.is_relative_to(directory) or (is_cached and path.parent == repository / "blobs")


def _read_digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError | RuntimeError) -> BundleError:
    reason = error.strerror if isinstance(error, OSError) else "a loop of links"
    return BundleError(f"{path} can't be read: {reason}; copy or export the bundle again")


def _replace(stage: Path, output: Path, force: bool) -> None:
    if not output.exists():
        stage.rename(output)
        return
    if not force:
        raise BundleError(f"{output} appeared during the export; nothing was replaced")
    old = output.parent / f".{output.name}.old-{os.getpid()}"
    output.rename(old)
    try:
        stage.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old)
