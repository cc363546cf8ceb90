"""Memory limits: parses and enforces `--max-ram`, and returns freed memory to the system."""

import ctypes
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from gemma_runtime.errors import MemoryLimit
from gemma_runtime.machine import format_bytes, peak_rss_bytes

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(text: str) -> int:
    """Parse `6GiB`, `1.5g`, `800MB` or plain bytes. Raises MemoryLimit for anything else."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmg]i?)?b?\s*", text.lower())
    if match is None or not float(match[1]):
        raise MemoryLimit(f"{text!r} is not an amount of memory; write it like 6GiB or 800MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


class Ceiling(Protocol):
    """A limit of the memory of something else than the host."""

    def check_estimate(self, estimate: int) -> None: ...

    def check_peak(self) -> None: ...


@dataclass(frozen=True, slots=True)
class MemoryCeiling:
    """`--max-ram`: compared with the estimate first, then with the peak while work proceeds.

    With the ceiling of a device that has memory of its own, that is compared too.
    """

    limit: int | None
    device: Ceiling | None = None

    def check_estimate(self, estimate: int, of_device: int | None = None) -> None:
        if self.device is not None and of_device is not None:
            self.device.check_estimate(of_device)
        if self.limit is not None and estimate > self.limit:
            raise MemoryLimit(
                f"this export needs about {format_bytes(estimate)}, --max-ram allows "
                f"{format_bytes(self.limit)}; raise it, or choose a smaller size"
            )

    def check_peak(self) -> None:
        if self.device is not None:
            self.device.check_peak()
        if self.limit is not None and (peak := peak_rss_bytes()) > self.limit:
            raise MemoryLimit(
                f"memory reached {format_bytes(peak)}, --max-ram allows "
                f"{format_bytes(self.limit)}; nothing was written"
            )


# Parameters of glibc's mallopt(3): values that keep freed memory, and the default values.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_KEPT = {_TRIM_THRESHOLD: (1 << 31) - 1, _MMAP_MAX: 0}
_DEFAULTS = {_TRIM_THRESHOLD: 128 << 10, _MMAP_MAX: 65536}


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let the C library reuse the memory of large freed tensors instead of unmapping it.

    glibc maps and unmaps every tensor above 32 MiB; clearing the pages each time takes as long as
    the matrix products. `release_memory` still returns free memory to the system.
    """
    _set_allocator(_KEPT)
    try:
        yield
    finally:
        _set_allocator(_DEFAULTS)
        release_memory()


def release_memory() -> None:
    """Return freed heap memory to the system. Does nothing unless the C library is glibc."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _set_allocator(values: Mapping[int, int]) -> None:
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        for parameter, value in values.items():
            mallopt(parameter, value)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc; None with another C library, such as musl."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return getattr(library, name) if hasattr(library, "malloc_trim") else None
