"""`gemma-export search`. Slow imports are made inside functions, so that `--help` stays fast."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_runtime.command import print_json, print_shown

if TYPE_CHECKING:
    from gemma_export.search.judge import Result
    from gemma_export.search.run import Advanced, Search, Told


def search(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="SEARCH.yaml",
            help="What to try, what to compare, and the budget. Its paths are relative to it.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of bundles, figures and the page. \\[out/NAME of the file]"),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Print what each cell will take and which ones are ruled out, then exit.",
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Reuse what is finished for the same checkpoint, request, text and versions.",
        ),
    ] = True,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            help="Cells exported and evaluated side by side on this machine. Speed and memory are "
            "measured one cell at a time, after that.",
        ),
    ] = 1,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Export and evaluate on this Ray cluster, which must see --output. Speed and "
            "memory are measured on this machine.",
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the search as JSON on stdout.")
    ] = False,
) -> None:
    """Export, evaluate and measure many bundles, and show the best ones.

    The file names checkpoints, targets and recipes, and a budget if there is one. The result is a
    table, OUTPUT/search.json, and the page OUTPUT/search.html with the Pareto front, the bundle to
    take, and why. A cell that fails stands in the table with its reason. After Ctrl-C, run it
    again: what was finished is kept.
    """
    from gemma_export.search.question import ask
    from gemma_export.search.run import How, plan_search, run_search
    from gemma_export.search.table import render_plan, render_search

    if ray is not None and workers != 1:
        raise typer.BadParameter("goes without --ray, which chooses itself", param_hint="--workers")
    question = ask(file)
    if plan:
        planned = plan_search(question)
        print_json(planned) if json else print_shown(*render_plan(planned))
        return
    folder = output or Path("out") / file.stem
    with _progress() as (tell, advanced):
        found = run_search(question, folder, How(workers, ray, resume), tell, advanced)
    page = _write(found, folder)
    if json:
        print_json(found)
    else:
        print_shown(*render_search(found))
        print(page)
    if found.take is None:
        raise typer.Exit(1)


def _write(found: "Search", folder: Path) -> Path:
    """Write search.json and the page; returns the page's path."""
    import msgspec

    from gemma_export.search.page import render_page
    from gemma_runtime.report.page import write_page

    page = folder / "search.html"
    write_page(folder / "search.json", msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    write_page(page, render_page(found))
    return page


@contextmanager
def _progress() -> "Iterator[tuple[Told, Advanced]]":
    """A line on stderr that says what is being done, and one for each finished cell."""
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text

    console = Console(stderr=True, soft_wrap=True)

    def advanced(result: "Result", number: int, count: int) -> None:
        console.print(Text(f"{number}/{count} {result.name}: {_told(result)}"))

    try:
        with Status("", console=console) as status:
            yield lambda text: status.update(Text(text)), advanced
    except KeyboardInterrupt:
        print("interrupted; run it again to go on: what was finished is kept", file=sys.stderr)
        raise


def _told(result: "Result") -> str:
    from gemma_export.search.measures import MEASURES, told, value_of

    figures = result.figures
    if figures is None:
        return result.reason
    known = [told(name, figures) for name in MEASURES if value_of(figures, name) is not None]
    return ", ".join([*known, *(["reused"] if result.is_reused else [])])
