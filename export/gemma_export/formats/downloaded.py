"""Recognises files that are names only: broken links and Git LFS pointers."""

from pathlib import Path

from gemma_runtime.errors import CheckpointError

_LFS = b"version https://git-lfs"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md


def check_downloaded(path: Path) -> None:
    """Raise CheckpointError if the file's content was never downloaded."""
    if path.is_symlink() and not path.exists():
        raise CheckpointError(
            f"{path} is a broken link to {path.readlink()}; download the checkpoint again"
        )
    if path.is_file() and starts_with(path, _LFS):
        raise CheckpointError(f"{path} is a Git LFS pointer, run git lfs pull")


def starts_with(path: Path, magic: bytes) -> bool:
    """Raises CheckpointError if the file can't be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
