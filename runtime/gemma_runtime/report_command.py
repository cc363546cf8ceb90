"""`gemma-runtime report`."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_runtime.options import BundlePaths, Threads

Texts = Annotated[
    list[Path],
    typer.Option(metavar="PATH", help="With --all: text by language for eval. Can be repeated."),
]
Folders = Annotated[
    list[Path],
    typer.Option(metavar="FOLDER", help="With --all: a folder with task files of your own."),
]


def report(
    bundles: BundlePaths,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")
    ],
    sources: Annotated[
        list[Path],
        typer.Option(
            "--from",
            metavar="PATH",
            help="Figures: a file that another command's --json printed, or a folder of them; also "
            "lm-eval's --output. Can be repeated.",
        ),
    ] = [],  # noqa: B006  (typer only reads the default)
    all_figures: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Measure what is missing: verify, inspect and bench; eval, tasks and safety if "
            "their inputs are given.",
        ),
    ] = False,
    text: Texts = [],  # noqa: B006
    tasks: Annotated[
        list[str],
        typer.Option(help="With --all: names of lm-eval's tasks. Can be repeated."),
    ] = [],  # noqa: B006
    include: Folders = [],  # noqa: B006
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --tasks: questions per task. \\[all]")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --all: harmful prompts for safety."),
    ] = None,
    harmless: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --all: harmless prompts for safety."),
    ] = None,
    replies: Annotated[
        int,
        typer.Option(min=0, help="With --prompts: tokens of a greedy reply, to count refusals."),
    ] = 0,
    repeats: Annotated[
        int, typer.Option(min=1, help="With --all: processes per bundle for bench.")
    ] = 5,
    threads: Threads = None,
) -> None:
    """Write one HTML page about bundles: what they are, and all figures that were measured.

    It shows what other commands printed with --json, and names the command for what is missing.
    Figures of other bundles, or of an earlier export, are refused. The page has no script, asks no
    server for anything, and holds the figures as JSON too. Tasks and safety compare the first
    bundle with each other one.
    """
    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.report.collected import collect
    from gemma_runtime.report.figures import read_sources
    from gemma_runtime.report.measuring import Inputs, measure_missing
    from gemma_runtime.report.page import check_output, render_page, write_page

    inputs = Inputs(
        texts=text,
        tasks=tasks,
        include=include,
        limit=limit,
        prompts=prompts,
        harmless=harmless,
        replies=replies,
        repeats=repeats,
        threads=threads,
    )
    if not all_figures and inputs.are_given():
        raise typer.BadParameter("inputs to measure with need --all")
    check_output(output)
    collected = collect([open_bundle(bundle) for bundle in bundles], read_sources(sources))
    if all_figures:
        collected = measure_missing(collected, inputs, _show_progress)
    write_page(output, render_page(collected))
    print(output)


def _show_progress(text: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(text, style="dim"))
