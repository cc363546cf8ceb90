"""Runs commands as child processes, all of which can be ended together."""

import subprocess
import tempfile
from dataclasses import dataclass
from signal import SIGINT, SIGKILL, Signals
from threading import Lock

_GRACE = 2.0  # seconds for children to end by the terminal's Ctrl-C, which they get too
_TURN = 0.5  # seconds
_PATIENCE = 20.0  # seconds for them to delete what is half-written


@dataclass(frozen=True, slots=True)
class Ended:
    code: int  # as in `subprocess.Popen`
    output: bytes  # of stdout
    errors: str  # of stderr

    @property
    def reason(self) -> str:
        """Why it failed, as one line."""
        if self.code < 0:
            return f"its process was ended by {Signals(-self.code).name}"
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        return (
            lines[-1].removeprefix("error: ") if lines else f"its process exited with {self.code}"
        )


class Processes:
    """Commands that threads of this process run."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._is_stopped = False

    def run(self, command: list[str]) -> Ended:
        """Run a command to its end. If waiting is interrupted, the command is ended too."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            with self._lock:
                if self._is_stopped:
                    return Ended(1, b"", "interrupted")
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors
                )
                self._running.add(process)
            try:
                code = _wait(process)
            except BaseException:
                _end(process)
                raise
            finally:
                with self._lock:
                    self._running.discard(process)
            out.seek(0)
            errors.seek(0)
            return Ended(code, out.read(), errors.read().decode("utf-8", "replace"))

    def stop(self) -> None:
        """End all commands and start no more. Each can still delete what is half-written."""
        with self._lock:
            self._is_stopped = True
            running = list(self._running)
        for process in running:
            _end(process)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait in short turns, between which Ray can interrupt this thread without a signal."""
    while True:
        try:
            return process.wait(_TURN)
        except subprocess.TimeoutExpired:
            pass


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that may be ending, then interrupt it, and at last kill it."""
    for patience, signal in ((_GRACE, SIGINT), (_PATIENCE, SIGKILL)):
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            process.send_signal(signal)
    process.wait()
