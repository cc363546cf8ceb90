"""The command `gemma-conformance`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from gemma_runtime.command import run_app

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Does a runtime of Gemma compute what the checkpoint says?",
)


@app.command()
def make(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the kit.")],
) -> None:
    """Write the kit: tiny checkpoints, and what the right model computes for each."""
    from gemma_conformance.kit import make_kit

    kit = make_kit(folder)
    print(f"wrote {len(kit.cases)} checkpoints to {folder}")


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A kit, written by make.")],
    systems: Annotated[str, typer.Option(help="Names of systems, with commas.")] = "all",
    checkpoints: Annotated[str, typer.Option(help="Names of checkpoints, with commas.")] = "all",
    python: Annotated[
        list[str],
        typer.Option(
            metavar="SYSTEM=PATH",
            help="The Python that has a system installed. Can be repeated; by default, this one.",
        ),
    ] = [],  # noqa: B006  (typer only reads the default)
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for one system on one checkpoint.")
    ] = 300,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the matrix.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page.")] = None,
) -> None:
    """Compare systems with the right model, and name their faults.

    Exits with 0 when all runs are judged, also if a system is wrong.
    """
    from gemma_conformance.kit import find_cases, open_kit
    from gemma_conformance.matrix import Matrix
    from gemma_conformance.page import check_outputs, write_matrix
    from gemma_conformance.survey import survey
    from gemma_conformance.systems import SYSTEMS, find_systems, read_pythons

    chosen = list(SYSTEMS) if systems == "all" else find_systems(systems.split(","))
    pythons = read_pythons(python)
    check_outputs([path for path in (json, html) if path is not None])
    kit = open_kit(folder)
    cases = kit.cases if checkpoints == "all" else find_cases(kit, checkpoints.split(","))

    def save(matrix: Matrix) -> None:  # after each system, as all can take an hour
        write_matrix(matrix, json, html)

    survey(kit, cases, chosen, pythons, timeout, _tell, save)


def main() -> None:
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run with these arguments; the exit code. An error of the user is one line on stderr."""
    return run_app(app, "gemma-conformance", arguments)


def _tell(text: str) -> None:
    print(text, flush=True)
