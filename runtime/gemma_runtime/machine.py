"""Describes the machine: hardware, load, memory bandwidth, and the memory of this process."""

import os
import platform
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import psutil

from gemma_runtime.errors import SessionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BANDWIDTH_BYTES = 256 << 20  # several times larger than any cache
_BUSY = 0.5  # load per core above which timings are unreliable
_THREADS_PER_CORE = 4  # most threads that `check_threads` accepts


@dataclass(frozen=True, slots=True)
class Machine:
    cpu: str
    physical_cores: int
    logical_cores: int
    memory_bytes: int
    system: str
    python: str
    runtimes: dict[str, str | None]  # package that runs an artifact -> version; None: missing


@dataclass(frozen=True, slots=True)
class Memory:
    """The resident memory of this process. None if the system doesn't report a figure."""

    peak_bytes: int  # the maximum so far
    anonymous_bytes: int | None  # now: heap, caches, repacked weights
    file_bytes: int | None  # now: mapped files, which the system may drop and read again


def describe_machine(packages: Iterable[str]) -> Machine:
    """This machine, with the installed versions of the given runtime packages."""

    return Machine(
        cpu=cpu_name(),
        physical_cores=physical_cores(),
        logical_cores=psutil.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        system=platform.platform(),
        python=platform.python_version(),
        runtimes={package: _version(package) for package in sorted(set(packages))},
    )


def physical_cores() -> int:
    return psutil.cpu_count(logical=False) or 1


def check_threads(threads: int | None) -> None:
    """Raise SessionError for more threads than cores can use; every thread takes memory."""
    most = _THREADS_PER_CORE * (psutil.cpu_count() or 1)
    if threads is not None and threads > most:
        raise SessionError(
            f"--threads is {threads}; this machine has {psutil.cpu_count() or 1} cores: choose "
            f"{most} or fewer"
        )


def load_average() -> float:
    """The number of runnable processes, averaged over the last minute."""
    return psutil.getloadavg()[0]


def is_busy(load: float) -> bool:
    return load > _BUSY * physical_cores()


def measure_bandwidth(threads: int, repeats: int = 7, size: int = _BANDWIDTH_BYTES) -> float:
    """Bytes per second that `threads` threads read from memory: the best of `repeats` runs."""
    import numpy as np  # nothing else here needs it, and --plan imports this module

    words = np.ones(size // 8, np.uint64)
    parts = np.array_split(words, threads)

    def read(part: "NDArray[np.uint64]") -> int:
        return int(part.sum())  # numpy releases the GIL here

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            started = perf_counter()
            list(pool.map(read, parts))
            best = min(best, perf_counter() - started)
    return words.nbytes / best


def measure_memory() -> Memory:
    """This process's memory: its peak so far, and its parts now."""
    rollup = _fields(Path("/proc/self/smaps_rollup"))
    resident, anonymous = rollup.get("Rss"), rollup.get("Anonymous")
    file = None if resident is None or anonymous is None else resident - anonymous
    return Memory(peak_rss_bytes(), anonymous, file)


def storage_bytes_read() -> int | None:
    """Bytes read from storage for this process so far; None if the system doesn't report it."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), None)


def drop_page_cache(paths: Iterable[Path]) -> bool:
    """Ask the system to drop these files from its page cache; False if it has no such call."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)  # unwritten pages can't be dropped
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
    return True


def format_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def peak_rss_bytes() -> int:
    """The peak resident memory of this process so far."""
    # getrusage would include the parent's memory at the time it started this process.
    if (peak := _fields(Path("/proc/self/status")).get("VmHWM")) is not None:
        return peak
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _version(package: str) -> str | None:
    from importlib import metadata  # slow to import, and --plan imports this module

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _fields(path: Path) -> dict[str, int]:
    """The `Name: 12 kB` lines of a file in /proc, in bytes; empty if there is no such file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    words = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(count) * 1024 for name, count, _ in words}
