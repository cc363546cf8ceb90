"""Runs a command-line app: its output, its streams, and its exit code."""

import io
import os
import sys
from _thread import interrupt_main
from collections.abc import Sequence
from errno import EBADF, EDQUOT, EFBIG, EIO, ENOSPC, EPIPE, EROFS
from threading import Timer
from typing import IO, TYPE_CHECKING

import typer

from gemma_runtime.errors import GemmaError

if TYPE_CHECKING:
    from rich.console import RenderableType

_FAILING = (ENOSPC, EDQUOT, EFBIG, EIO, EROFS, EBADF)


def run_app(app: typer.Typer, name: str, arguments: Sequence[str]) -> int:
    """Run with the given arguments; returns the exit code. A GemmaError is one line on stderr.

    So is a disk that is full or fails, behind stdout or elsewhere.
    """
    _open_streams()
    try:
        code, failure = _run(app, name, arguments), _flush()
    except OSError as error:
        if error.errno not in _FAILING and (error.errno != EPIPE or error.filename is not None):
            raise
        code, failure = 1, error
        _flush()
    if failure is None:
        return code
    if failure.errno != EPIPE:  # a reader such as head has seen enough
        print(f"error: {_failed(failure)}: {failure.strerror}", file=sys.stderr)
    return 1


def _failed(error: OSError) -> str:
    """What a full or failing disk stopped, as far as the error tells."""
    done = "read or written" if error.errno == EIO else "written"
    return f"{error.filename or 'the output, or a file,'} can't be {done}"


def print_shown(*shown: "RenderableType") -> None:
    from rich.console import Console

    Console().print(*shown, sep="\n")


def print_json(value: object) -> None:
    import msgspec

    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


def _run(app: typer.Typer, name: str, arguments: Sequence[str]) -> int:
    sys.unraisablehook, shown = _interrupt_again, sys.unraisablehook
    try:
        app(list(arguments), prog_name=name)
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 1
    except GemmaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        sys.unraisablehook = shown
    return 0


def _interrupt_again(lost: "sys.UnraisableHookArgs") -> None:
    """Repeat a Ctrl-C that Python dropped, as it does in callbacks of a running import."""
    if lost.exc_type is KeyboardInterrupt:
        Timer(0.01, interrupt_main).start()
    else:
        sys.__unraisablehook__(lost)


def _open_streams() -> None:
    """Open closed streams on the null device, and print `?` for what a stream can't encode."""
    sys.stdin = sys.stdin or _null("r")
    sys.stdout = sys.stdout or _null("w")
    sys.stderr = sys.stderr or _null("w")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def _null(mode: str) -> IO[str]:
    """Takes the closed stream's descriptor, so that no other file gets it."""
    return open(os.devnull, mode, encoding="utf-8")


def _flush() -> OSError | None:
    """Write out stdout; the error if that fails. The interpreter's own attempt at exit is quiet."""
    try:
        sys.stdout.flush()
    except OSError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        return error
    return None
