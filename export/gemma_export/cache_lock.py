"""Locks in the cache: one process writes an entry, any number use it, and used entries stay.

They are locks of the operating system, which releases those of a dead process. Lock files are empty
and lie beside the entry that they protect. This module does not import torch.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from weakref import finalize

from filelock import FileLock, Timeout

_PATIENCE = 2.0  # seconds to wait before telling the user why


@contextmanager
def exclusive(path: Path, work: str, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the only right to write `path`. Waits for another process that has it, with a note."""
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
    """Prevents the removal of a path for as long as this object lives.

    Create it inside `exclusive`. Each object has its own lock, so any number of processes can use a
    path.
    """

    def __init__(self, path: Path) -> None:
        descriptor, name = tempfile.mkstemp(".lock", f"{path.stem}.use-", path.parent)
        os.close(descriptor)
        lock = FileLock(name)
        lock.acquire(timeout=0)
        finalize(self, _release, lock)


@contextmanager
def removable(path: Path) -> Iterator[bool]:
    """Yields whether no process writes or uses `path`; none can start to until the block ends."""
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
    """Whether the process that created this lock is dead; if so, deletes the lock file."""
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
