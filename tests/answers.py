"""Runs command lines in one process and prints the exit code and the output of each.

    python tests/answers.py < calls.json > answers.json

Each call is a list of words; the first is the program. This file imports nothing but the product,
so any environment that has it installed can run it. The variable BLOCKED lists modules and packages
that then behave as if they were not installed.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import sys
import traceback
from typing import NoReturn


def block(names: list[str]) -> None:
    """Make these modules and distributions behave as if they were not installed."""

    def missing(name: str) -> NoReturn:
        raise importlib.metadata.PackageNotFoundError(name)

    installed = importlib.metadata.version

    def version(distribution_name: str) -> str:
        return (
            missing(distribution_name)
            if distribution_name in names
            else installed(distribution_name)
        )

    importlib.metadata.version = version
    for name in names:
        sys.modules[name] = None  # type: ignore[assignment]


def answer(words: list[str]) -> dict[str, object]:
    from gemma_export.cli import run
    from gemma_runtime.cli import run_command

    program = {"gemma-export": run, "gemma-runtime": run_command}[words[0]]
    raw = io.BytesIO()
    out, err = io.TextIOWrapper(raw), io.StringIO()
    code: int | str
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = program(words[1:])
        except BaseException:
            code = traceback.format_exc()
    out.flush()
    return {"code": code, "out": raw.getvalue().decode(), "err": err.getvalue()}


if __name__ == "__main__":
    block([name for name in os.environ.get("BLOCKED", "").split(",") if name])
    json.dump([answer(words) for words in json.load(sys.stdin)], sys.stdout)
