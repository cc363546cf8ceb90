"""Tells whether a reader took an input well: a result or one line of error, soon and in bounds."""

import resource
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gemma_runtime.errors import GemmaError

MOST_SECONDS = 5.0  # of the processor, for one input
MOST_BYTES = 256 << 20  # that one input may add to the process
_LONGEST = 2000  # characters of an error
_CLEAR = Path("/proc/self/clear_refs")

Read = Callable[[bytes], object]


@dataclass(frozen=True, slots=True)
class Verdict:
    accepted: bool
    seconds: float
    added_bytes: int  # to the process's peak
    problem: str | None


def judge(read: Read, data: bytes, most_bytes: int = MOST_BYTES) -> Verdict:
    """Read an input. A problem is any error but the project's own, or too much time or memory."""
    before = _peak_bytes()
    start = time.process_time()
    problem, accepted = None, False
    try:
        read(data)
        accepted = True
    except GemmaError as error:
        problem = _wrong_line(str(error))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{'/'.join(Path(place.filename).parts[-2:])}:{place.lineno}"
        problem = f"{type(error).__name__} at {where}: {error!s:.200}"
    seconds = time.process_time() - start
    added = _peak_bytes() - before
    if problem is None and seconds > MOST_SECONDS:
        problem = f"took {seconds:.1f} s, expected less than {MOST_SECONDS:g}"
    if problem is None and added > most_bytes:
        problem = f"took {added >> 20} MiB, expected less than {most_bytes >> 20}"
    return Verdict(accepted, seconds, added, problem)


def _wrong_line(message: str) -> str | None:
    """What is wrong with the line that users would see."""
    if not message.strip():
        return "an error without a message"
    if "\n" in message:
        return f"an error of several lines: {message!r:.200}"
    if len(message) > _LONGEST:
        return f"an error of {len(message)} characters: {message!r:.200}"
    return None


def reset_peak() -> None:
    """Make the process's peak what it has now, so that the next input's share shows. On Linux."""
    if _CLEAR.exists():
        with suppress(OSError):
            _CLEAR.write_text("5")


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
