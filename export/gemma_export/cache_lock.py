"""Locks in the cache: one process writes a thing, any number use it, and nobody removes it then.

Locks are the operating system's: those of a process that died are free. Their files are empty and
lie beside what they protect. This module does not import torch.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from weakref import finalize

from filelock import FileLock, Timeout

_PATIENCE = 2.0  # seconds before the user is told what the process waits for


@contextmanager
def exclusive(path: Path, work: str, note: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes from writing `path`; wait while one does, and say so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock_of(path)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        note(f"another gemma-export is {work}; waiting for it to finish")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class InUse:
    """Keeps `removable` from giving a path away, as long as this object lives.

    Made inside `exclusive`. Each has a lock of its own, so any number of processes use a path.
    """

    def __init__(self, path: Path) -> None:
        descriptor, name = tempfile.mkstemp(".lock", f"{path.stem}.use-", path.parent)
        os.close(descriptor)
        lock = FileLock(name)
        lock.acquire(timeout=0)
        finalize(self, _release, lock)


@contextmanager
def removable(path: Path) -> Iterator[bool]:
    """Whether no process writes or uses `path`; as long as the block runs, none begins to."""
    lock = _lock_of(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        uses = path.parent.glob(f"{escape(path.stem)}.use-*.lock")
        yield all([_is_left(use) for use in uses])
    finally:
        lock.release()


def _lock_of(path: Path) -> FileLock:
    return FileLock(path.with_name(f"{path.stem}.lock"))


def _is_left(use: Path) -> bool:
    """Whether the process that made this lock is dead; its file goes then."""
    lock = FileLock(use)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    _release(lock)
    return True


def _release(lock: FileLock) -> None:
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)
