"""`gemma-runtime eval`, `lm-eval`, `compare` and `safety`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from gemma_runtime.command import print_json, print_shown
from gemma_runtime.options import BundlePath, Json, Threads, bundle_folder

Run = Annotated[
    Path, typer.Argument(help="A folder of lm_eval's results, or one results_*.json of it.")
]


def evaluate(
    bundle: BundlePath,
    text: Annotated[
        list[Path],
        typer.Option(
            metavar="PATH",
            help="A folder, or several files, with text by language: de.txt, notes.de.txt, "
            "de/1.txt. One file is cut into texts at blank lines. Can be repeated. "
            "\\[the text given to --eval-text at export]",
        ),
    ] = [],  # noqa: B006  (typer only reads the default)
    exact: Annotated[
        bool, typer.Option("--exact", help="Use the graph with float activations.")
    ] = False,
    noise: Annotated[
        bool,
        typer.Option(
            "--noise", help="Also score token by token: what rounding alone changes. Takes longer."
        ),
    ] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """What quantization costs each language, the worst first.

    Perplexity, bits per byte and tokens per character. For a bundle exported with --eval-text also
    the perplexity's ratio to the float32 model's with a 95 % interval, KL and top-1.
    """
    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.contents.subject import with_subject
    from gemma_runtime.proof.evaluate import evaluate_bundle
    from gemma_runtime.proof.evaluation_table import render_evaluation
    from gemma_runtime.proof.texts import read_segments

    texts = read_segments(*text) if text else None
    opened = open_bundle(bundle)
    evaluation = evaluate_bundle(opened, texts, threads, exact=exact, noise=noise)
    if json:
        print_json(with_subject(opened, evaluation))
    else:
        print_shown(*render_evaluation(str(bundle), evaluation))


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

    Needs the extra `eval`; some tasks need one of lm-eval's own extras, too, such as `ifeval`. The
    tasks' data comes from the hub; tasks of your own can use files.
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
    isolation = results["config"]["code_isolation"]
    if isolation is not None and "namespaces" not in isolation:
        print(
            "warning: the model's code could reach the network: see code_isolation", file=sys.stderr
        )


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
    json: Json = False,
) -> None:
    """Compare two runs of lm-eval on the same questions, pair by pair.

    Prints the difference with its 95 % interval, answers lost and won, McNemar's exact p, and how
    the probability of the right choice changed. The runs can be of any model that lm_eval runs.
    """
    from gemma_runtime.proof.compare_runs import compare_runs
    from gemma_runtime.proof.compare_table import render_runs

    comparison = compare_runs(run_a, run_b, noise)
    if json:
        print_json(comparison)
    else:
        print_shown(*render_runs(comparison, all_tasks=all_tasks))


def safety(
    bundle: BundlePath,
    bundle_b: Annotated[
        Path | None,
        typer.Argument(
            metavar="BUNDLE_B",
            parser=bundle_folder,
            help="The bundle to compare with; without it, BUNDLE's exact graph is the one before.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Harmful prompts: one a line, or .jsonl with prompt, id, harmless."
        ),
    ] = None,
    harmless: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Prompts that a model should answer, to see over-refusal."
        ),
    ] = None,
    replies: Annotated[
        int,
        typer.Option(min=0, help="Tokens of a greedy reply to each prompt, to count refusals."),
    ] = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Compare how two bundles react to the same prompts: what quantization changes in refusals.

    Without replies: the log-odds of refusing against complying openings, its paired change with a
    95 % interval, and the KL divergence at the reply's first token. With --replies also refusals
    lost and new, by English key words: a lower bound. Prompts are not printed; --json has replies.
    """
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text

    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.proof.safety import compare_safety
    from gemma_runtime.proof.safety_prompts import read_prompts
    from gemma_runtime.proof.safety_table import render_safety

    files = [(prompts, False), (harmless, True)]
    texts = [text for path, kind in files if path is not None for text in read_prompts(path, kind)]
    if not texts:
        raise typer.BadParameter("give --prompts FILE, --harmless FILE or both")
    other = None if bundle_b is None else open_bundle(bundle_b)
    with Status("", console=Console(stderr=True)) as status:
        comparison = compare_safety(
            open_bundle(bundle),
            other,
            texts,
            replies=replies,
            threads=threads,
            on_progress=lambda text: status.update(Text(text)),
        )
    if json:
        print_json(comparison)
    else:
        print_shown(*render_safety(comparison))
