"""Folders that all pytest-xdist workers share, so that slow work is done once per run."""

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
    """A folder of this run that the first worker fills; the other workers wait, then read it.

    `fill` must not depend on the worker. If `fill` fails, the next worker tries again.
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
