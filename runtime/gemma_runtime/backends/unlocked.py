"""Keeps a mapped file out of locked memory, so that the system may drop its pages.

executorch's Python runtime locks all constants of a program that it loads, where the system lets
it. A table of which a token reads a few KB would then take gigabytes of memory.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MAPS = Path("/proc/self/maps")


@contextmanager
def unlocked(path: Path) -> Iterator[None]:
    """No page of the file that is mapped inside this block is locked after it.

    The limit keeps others than root from locking at all, which would read the whole file.
    """
    if sys.platform == "win32":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
        _unlock(path.resolve())


def _unlock(path: Path) -> None:
    if not _MAPS.exists():
        return
    libc = ctypes.CDLL(None)
    for line in _MAPS.read_text("utf-8").splitlines():
        span, *_, name = line.split(maxsplit=5)
        if name == str(path):
            start, stop = (int(place, 16) for place in span.split("-"))
            libc.munlock(ctypes.c_void_p(start), ctypes.c_size_t(stop - start))
