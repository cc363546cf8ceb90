"""Runs commands in forks of a process that has imported everything.

So a command takes a second and not ten, and what disturbs it comes while it works, not while it
imports.
"""

import atexit
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from tests.campaign.workplace import Workplace

_IMPORTED = (
    "gemma_export.pipeline",
    "gemma_export.quantize.calibrated",
    "gemma_export.targets.coreml.target",
    "gemma_export.targets.gguf.target",
    "gemma_export.targets.hf.target",
    "gemma_export.targets.onnx.target",
    "gemma_export.sidecars.teacher",
    "gemma_runtime.talk",
    "gemma_runtime.text.baked",
    "onnxruntime",
    "rich.progress",
)
_OUTPUTS = ("stdout", "stderr")
_HUNG = 120.0  # seconds after which a command counts as hung


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended. A negative code is the number of the signal that killed it."""

    code: int
    output: str
    errors: str
    seconds: float

    @property
    def is_hung(self) -> bool:
        return self.seconds >= _HUNG


class Running:
    """A command that was started."""

    def __init__(self, pid: int, folder: Path) -> None:
        self._pid = pid
        self._folder = folder
        self._started = time.monotonic()

    def signal(self, number: int) -> None:
        try:
            os.killpg(self._pid, number)
        except ProcessLookupError:  # it has no group of its own yet
            os.kill(self._pid, number)

    def wait(self, seconds: float) -> bool:
        """Whether it ends within that time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return True
            time.sleep(0.002)
        return False

    def ended(self) -> Ended:
        """Wait for the end; a command that hangs is killed."""
        if not self.wait(_HUNG):
            self.signal(signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        return Ended(
            os.waitstatus_to_exitcode(status),
            (self._folder / "stdout").read_text("utf-8", "replace"),
            (self._folder / "stderr").read_text("utf-8", "replace"),
            time.monotonic() - self._started,
        )


def import_all() -> None:
    """Import what the commands need. Threads must not run when a process forks: torch gets one."""
    for name in _IMPORTED:
        import_module(name)
    import_module("torch").set_num_threads(1)


def start(
    program: str, arguments: list[str], at: Workplace, before: Callable[[], None] | None = None
) -> Running:
    """Run `program`, MODULE:FUNCTION, in a fork. `before` is called there first."""
    logs = at.folder / "logs" / str(time.monotonic_ns())
    logs.mkdir(parents=True)
    for name in _OUTPUTS:
        (logs / name).touch()  # now, since a kill may come before the fork opens them
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _become(program, arguments, at, logs, before)
    return Running(pid, logs)


def _become(
    program: str,
    arguments: list[str],
    at: Workplace,
    logs: Path,
    before: Callable[[], None] | None,
) -> None:
    """The forked process: never returns."""
    code = 70
    try:
        os.setsid()
        for descriptor, name in enumerate(_OUTPUTS, 1):
            file = os.open(logs / name, os.O_WRONLY)
            os.dup2(file, descriptor)
        os.environ["GEMMA_EXPORT_CACHE"] = str(at.cache)
        if before:
            before()
        module, _, function = program.partition(":")
        code = getattr(import_module(module), function)(arguments)
        atexit._run_exitfuncs()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        disarm()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def disarm() -> None:
    """Switch faults off, if they were loaded."""
    armed = getattr(ctypes.CDLL(None), "arm", None)
    if armed:
        armed(0, 0, b"", 0)
