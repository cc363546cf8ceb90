"""`gemma-runtime compare`."""

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[
    Path, typer.Argument(help="A folder of lm_eval's results, or one results_*.json of it.")
]


def compare(
    run_a: Run,
    run_b: Run,
    noise: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="One more run of RUN_B's bundle (or RUN_A's) with another --chunk: how much "
            "rounding alone changes.",
        ),
    ] = None,
    all_tasks: Annotated[
        bool, typer.Option("--all", help="Also print each task of a group.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Figures as JSON on stdout.")] = False,
) -> None:
    """Compare two runs of lm-eval on the same questions, pair by pair.

    Prints the difference with its 95 % interval, answers lost and won, McNemar's exact p, and how
    the probability of the right choice changed. The runs can be of any model that lm_eval runs.
    """
    from gemma_runtime.proof.compare_runs import compare_runs
    from gemma_runtime.proof.compare_table import render_runs

    comparison = compare_runs(run_a, run_b, noise)
    if json:
        import sys

        import msgspec

        sys.stdout.buffer.write(msgspec.json.encode(comparison) + b"\n")
        sys.stdout.buffer.flush()
    else:
        from rich.console import Console

        Console().print(*render_runs(comparison, all_tasks=all_tasks), sep="\n")
