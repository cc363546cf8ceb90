"""Folders that all workers of pytest-xdist share, so that none does another's work again."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

_DONE = "done"


def _leave_empty(folder: Path) -> None:
    del folder


def shared_folder(
    factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None] = _leave_empty
) -> Path:
    """A folder of this run, filled by the first worker that asks; the others wait for it.

    What `fill` writes for one worker must do for all. A failed `fill` is tried again by the next.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = factory.mktemp(name)
        fill(folder)
        return folder
    from filelock import FileLock

    base = factory.getbasetemp().parent / "shared"
    base.mkdir(exist_ok=True)
    with FileLock(base / f"{name}.lock"):
        folder, done = base / name, base / f"{name}.{_DONE}"
        if not done.exists():
            folder.mkdir(exist_ok=True)
            fill(folder)
            done.touch()
    return folder
