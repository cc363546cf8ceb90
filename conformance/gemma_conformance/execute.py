"""Runs a system on a checkpoint, in a process of its own with bounded time."""

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from gemma_conformance.kit import Case, Kit, shown_messages
from gemma_conformance.systems import System
from gemma_runtime.formats.json_bytes import decode_json

FIRST = 5  # tokens that are fed at once before single steps
_RUN = Path(__file__).parent / "runners" / "run.py"
# Our own systems are imported from where this process has them.
_OWN = ("run_ours", "run_llama")


class _Answer(msgspec.Struct):
    errors: dict[str, str]
    versions: dict[str, str] = {}
    log_probabilities: bool = False
    prefill: list[list[float]] | None = None
    decode: list[list[float]] | None = None
    greedy: list[int] | None = None
    chat: list[int] | int | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """What a system computed. What it couldn't is None, and `errors` has the reason by part."""

    errors: dict[str, str]
    versions: dict[str, str]
    log_probabilities: bool = False  # the rows are log-probabilities
    prefill: NDArray[np.float64] | None = None  # after each token, (T, V)
    decode: NDArray[np.float64] | None = None  # after token FIRST and each later one
    greedy: tuple[int, ...] | None = None
    chat: tuple[int, ...] | int | None = None  # tokens of the chat, or only their number


def execute(kit: Kit, case: Case, system: System, python: str | None, timeout_s: float) -> Output:
    """Never raises for what the system does: a crash is an Output with errors."""
    with tempfile.TemporaryDirectory(prefix="gemma-conformance-") as folder:
        scratch = Path(folder)
        job, answer = scratch / "job.json", scratch / "answer.json"
        job.write_bytes(
            msgspec.json.encode(
                {
                    "runner": system.runner,
                    "options": dict(system.options),
                    "checkpoint": str(kit.checkpoint(case).absolute()),
                    "scratch": str(scratch),
                    "answer": str(answer),
                    "tokens": case.tokens,
                    "first": FIRST,
                    "prompt": case.prompt,
                    "new": len(case.greedy),
                    "messages": shown_messages(),
                }
            )
        )
        ending = _run([python or sys.executable, str(_RUN), str(job)], system, scratch, timeout_s)
        return _read(answer, ending)


def _run(command: list[str], system: System, scratch: Path, timeout_s: float) -> str:
    """How the process ended, if not by itself with 0; else an empty text."""
    variables = {**os.environ, "GEMMA_EXPORT_CACHE": str(scratch / "cache")}
    if system.runner not in _OWN:  # or our packages would stand before the system's own
        variables.pop("PYTHONPATH", None)
    with (scratch / "log.txt").open("wb") as log:
        try:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=variables, cwd=scratch, start_new_session=True
            )
        except OSError as error:
            return f"can't start {command[0]}: {error.strerror}"
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"stopped after {timeout_s:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with code {code}: {_last_line(scratch / 'log.txt')}" if code else ""


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


def _read(path: Path, ending: str) -> Output:
    if not path.exists():
        return Output({"load": ending or "no answer"}, {})
    try:
        answer = decode_json(path.read_bytes(), _Answer)
    except msgspec.DecodeError as error:
        return Output({"load": f"the answer can't be read: {error}"}, {})
    errors = dict(answer.errors)
    if ending and not errors:
        missing = [n for n in ("prefill", "decode", "greedy") if getattr(answer, n) is None]
        errors[missing[0] if missing else "end"] = ending
    return Output(
        errors,
        answer.versions,
        answer.log_probabilities,
        _array(answer.prefill),
        _array(answer.decode),
        None if answer.greedy is None else tuple(answer.greedy),
        tuple(answer.chat) if isinstance(answer.chat, list) else answer.chat,
    )


def _array(rows: list[list[float]] | None) -> NDArray[np.float64] | None:
    return None if rows is None else np.array(rows, np.float64)
