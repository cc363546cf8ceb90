"""`gemma-runtime lm-eval` and `gemma-runtime compare`."""

from pathlib import Path
from typing import Annotated

import typer


def _check_threads(threads: int | None) -> int | None:
    if threads is not None:
        from gemma_runtime.machine import check_threads

        check_threads(threads)
    return threads


def _bundle_folder(text: str) -> Path:
    from gemma_runtime.hub import HUB_PREFIX, fetch_bundle

    is_on_hub = text.startswith(HUB_PREFIX)
    return fetch_bundle(text.removeprefix(HUB_PREFIX)) if is_on_hub else Path(text)


BundlePath = Annotated[
    Path,
    typer.Argument(
        metavar="BUNDLE",
        parser=_bundle_folder,
        help="The bundle's folder, or hub:OWNER/NAME\\[@REVISION].",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, callback=_check_threads, help="Number of threads. \\[physical cores]"),
]
Run = Annotated[
    Path, typer.Argument(help="A folder of lm_eval's results, or one results_*.json of it.")
]


def lm_eval(
    bundle: BundlePath,
    tasks: Annotated[
        list[str],
        typer.Option(help="Name of a task or group, or several with commas; mmlu_* is a pattern."),
    ],
    include: Annotated[
        list[Path],
        typer.Option(metavar="FOLDER", help="A folder with task files of your own."),
    ] = [],  # noqa: B006  (typer only reads the default)
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per task. \\[all]")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Worked examples before a question. \\[the task's]")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask in turns, for tuned models.")
    ] = False,
    fewshot_as_multiturn: Annotated[
        bool, typer.Option(help="With a chat template: worked examples as turns of their own.")
    ] = True,
    system: Annotated[
        str | None, typer.Option(help="System prompt: instructions before the first turn.")
    ] = None,
    gen_kwargs: Annotated[
        str | None,
        typer.Option(help="Replace a task's generation values: temperature=0.8,do_sample=True."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of worked examples and sampling. \\[lm_eval's]")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Use the graph with float activations.")
    ] = False,
    chunk: Annotated[
        int, typer.Option(help="Tokens fed at once: an even number from 2 to 64.")
    ] = 32,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where results and every answer are written."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in --output.")
    ] = False,
    run_unsafe_code: Annotated[
        bool,
        typer.Option("--run-unsafe-code", help="Let tasks such as humaneval run the model's code."),
    ] = False,
    threads: Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Results as JSON on stdout.")] = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a bundle: MMLU, GSM8K, ARC, IFEval and others.

    Needs the extra `eval`. The tasks' data comes from the hub; tasks of your own can use files.
    """
    from gemma_runtime.lm_eval.run import ModelOptions, TaskOptions, render_results, run_tasks

    results = run_tasks(
        bundle,
        TaskOptions(
            tasks=[name for names in tasks for name in names.split(",") if name],
            include=include,
            limit=limit,
            num_fewshot=num_fewshot,
            chat_template=apply_chat_template,
            fewshot_as_multiturn=fewshot_as_multiturn,
            system=system,
            gen_kwargs=gen_kwargs,
            seed=seed,
            run_unsafe_code=run_unsafe_code,
        ),
        ModelOptions(threads=threads, exact=exact, chunk=chunk),
        output,
        resume,
    )
    print(_json(results) if json else render_results(results))


def _json(results: object) -> str:
    import json

    from lm_eval.utils import handle_non_serializable

    return json.dumps(results, default=handle_non_serializable, ensure_ascii=False)


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
