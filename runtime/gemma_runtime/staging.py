"""Files and folders that appear whole or not at all."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` when the block ends and deleted if it fails.

    Creates the folder and removes leftovers of killed processes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_leftovers(path.parent, path.name)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sweep_leftovers(directory: Path, name: str) -> None:
    """Remove `NAME.partial-PID` and `NAME.old-PID` of processes that no longer run.

    Also those with this process's id: containers reuse ids, so a dead process had the same one.
    """
    for path in directory.glob(f"{escape(name)}.*-*"):
        owner = re.fullmatch(r"(?:partial|old)-(\d{1,9})", path.name[len(name) + 1 :])
        if owner and (int(owner[1]) == os.getpid() or not _is_alive(int(owner[1]))):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
