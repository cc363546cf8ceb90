"""Closed streams, full disks, other encodings, and Ctrl-C while modules are imported."""

import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from gemma_runtime.command import run_app

BUNDLE = str(Path(__file__).parents[1] / "data" / "tiny")
RUN = ("run", BUNDLE, "hé", "--max-new-tokens", "4")
RUNTIME, EXPORT = "gemma_runtime", "gemma_export"


def command(program: str, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-c", f"from {program}.start import main; main()", *arguments]


def done(
    program: str, *arguments: str, encoding: str = "utf-8", **options: Any
) -> "subprocess.CompletedProcess[bytes]":
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options}
    return subprocess.run(
        command(program, arguments), stderr=subprocess.PIPE, env=environment, **options
    )


def close(descriptor: int) -> dict[str, Any]:
    return {"preexec_fn": lambda: os.close(descriptor)}


@pytest.mark.parametrize("arguments", [("run", BUNDLE, "-"), ("chat", BUNDLE)], ids=["run", "chat"])
def test_a_closed_stdin_is_an_empty_one(arguments: Sequence[str]) -> None:
    ended = done(RUNTIME, *arguments, "--max-new-tokens", "2", **close(0))
    assert ended.returncode == 0
    assert b"Traceback" not in ended.stderr


@pytest.mark.parametrize("descriptor", [1, 2])
def test_a_closed_output_ends_without_a_traceback(descriptor: int) -> None:
    ended = done(RUNTIME, *RUN, **close(descriptor))
    assert ended.returncode == 0
    assert b"Traceback" not in ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (RUNTIME, RUN),
        (RUNTIME, (*RUN, "--json")),
        (RUNTIME, ("inspect", BUNDLE)),
        (EXPORT, ("--size", "2b", "--plan", "--json")),
        (EXPORT, ("--version",)),
    ],
    ids=["run", "run --json", "inspect", "--plan --json", "--version"],
)
def test_a_full_disk_behind_stdout_is_one_line(program: str, arguments: Sequence[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        ended = done(program, *arguments, stdout=full)
    assert ended.returncode == 1
    found = "error: the output, or a file, can't be written: No space left on device\n"
    assert ended.stderr.decode() == found


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_characters_that_a_stream_cannot_encode_are_replaced(encoding: str) -> None:
    for arguments in (RUN, ("inspect", BUNDLE), ("inspect", "/nowhere/é…€")):
        ended = done(RUNTIME, *arguments, encoding=encoding)
        assert ended.returncode == (1 if "/nowhere/é…€" in arguments else 0)
        assert b"Traceback" not in ended.stderr


@pytest.mark.parametrize("program", [RUNTIME, EXPORT])
def test_an_interrupt_while_the_command_is_imported_exits_quietly(program: str) -> None:
    """A finder stands in for a slow disk: it tells when typer is about to be imported."""
    code = (
        "import sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer':\n"
        "            print('importing', flush=True)\n"
        "            time.sleep(60)\n"
        f"from {program}.start import main\n"
        "sys.meta_path.insert(0, Slow())\n"
        "main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Background jobs of a shell ignore SIGINT, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (130, b"")


def test_an_interrupt_that_python_drops_in_a_callback_is_repeated() -> None:
    """Imports hold such callbacks: Ctrl-C in one was printed, and the command went on."""
    app = typer.Typer()

    class Kept:
        pass

    def interrupt(reference: object) -> None:
        raise KeyboardInterrupt

    @app.command()
    def wait() -> None:
        import time

        kept = Kept()
        reference = weakref.ref(kept, interrupt)
        del kept
        assert reference() is None
        time.sleep(60)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        assert run_app(app, "wait", []) == 130
    finally:
        signal.signal(signal.SIGINT, before)
