"""Runs a command-line app and turns the outcome into an exit code."""

import sys
from collections.abc import Sequence

import typer

from gemma_runtime.errors import GemmaError


def run_app(app: typer.Typer, name: str, arguments: Sequence[str]) -> int:
    """Run with the given arguments; returns the exit code. A GemmaError is one line on stderr."""
    try:
        app(list(arguments), prog_name=name)
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 1
    except GemmaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
