"""`gemma-runtime`: run, check, measure and inspect bundles. Prints; the library does not."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from gemma_runtime import bake_command, bundle_commands, evaluation_commands, report_command
from gemma_runtime.command import print_json, print_shown, run_app
from gemma_runtime.embed_command import embed
from gemma_runtime.options import (
    BundlePaths,
    Json,
    Threads,
)
from gemma_runtime.talk import chat, run

_HELP = """Run, check and measure the bundles that gemma-export writes. Needs no torch.

[bold]Examples[/bold]

  gemma-runtime run out/gemma --chat "Why is the sky blue?"

  gemma-runtime run out/gemma - --temperature 0.8 < story.txt

  gemma-runtime chat out/gemma --system "Answer in one sentence."

  gemma-runtime bake out/gemma helper.safetensors --system prompt.txt

  gemma-runtime chat out/gemma --baked helper.safetensors   (starts at once)

  gemma-runtime embed out/embeddinggemma "Why is the sky blue?" --prompt query

  gemma-runtime verify out/gemma

  gemma-runtime sign out/gemma --key minisign.key   (for those who check it with verify --key)

  gemma-runtime eval out/gemma --text story.txt

  gemma-runtime lm-eval out/gemma --tasks mmlu --output runs/gemma

  gemma-runtime compare runs/float runs/gemma

  gemma-runtime safety out/float out/gemma --prompts harmful.txt   (before and after)

  gemma-runtime chat out/gemma --guard out/shieldgemma

  gemma-runtime run hub:owner/gemma "Hello"   (downloads the bundle once)

  gemma-runtime bench out/a out/b      (in turns; ratios to the first)

  gemma-runtime pack out/gemma         (sessions then map its weights)

  gemma-runtime inspect out/a out/b    (do they hold the same codes?)

  gemma-runtime report out/a out/b --from figures/ -o report.html   (one page of all figures)

Text and figures go to stdout, speed and errors to stderr.

Exit codes: 0 success, 1 a check failed or the input was refused, 2 wrong usage.
"""

app = typer.Typer(
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        print(f"gemma-runtime {metadata.version('gemma-export')}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    del version


app.command()(run)
app.command()(chat)
app.command()(embed)
app.command()(bake_command.bake)
app.command()(bake_command.baked)
app.command()(bundle_commands.verify)


@app.command()
def bench(
    bundles: BundlePaths,
    repeats: Annotated[
        int, typer.Option(min=1, help="Processes per bundle; figures are medians.")
    ] = 5,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded in each process.")] = 64,
    threads: Threads = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print the time of each operator instead.")
    ] = False,
    sustained: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            min=0.01,
            help="Decode for so long instead, and print how the speed held up. --new-tokens are "
            "those of each round.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Measure loading, first token, decoding and memory; several bundles take turns.

    Use an idle machine: on a busy one times are too long, and a warning says so.
    """
    from gemma_runtime.measure.bench import measure
    from gemma_runtime.measure.bench_table import render_benchmark

    if profile:
        if sustained is not None:
            raise typer.BadParameter("goes without --profile", param_hint="--sustained")
        _profile(bundles, threads, json)
        return
    if sustained is not None:
        _sustain(bundles, sustained, threads, new_tokens, json)
        return
    with _progress() as tell:
        benchmark = measure(
            bundles, threads=threads, repeats=repeats, new_tokens=new_tokens, on_progress=tell
        )
    if json:
        print_json(benchmark)
    else:
        print_shown(render_benchmark(benchmark))


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being measured."""
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text

    with Status("", console=Console(stderr=True)) as status:
        yield lambda text: status.update(Text(text))  # a folder's name may look like markup


def _sustain(
    bundles: list[Path], minutes: float, threads: int | None, new_tokens: int, json: bool
) -> None:
    from gemma_runtime.measure.sustained import measure_sustained, render_sustained

    with _progress() as tell:
        sustained = measure_sustained(
            bundles, minutes=minutes, threads=threads, new_tokens=new_tokens, on_progress=tell
        )
    if json:
        print_json(sustained)
    else:
        print_shown(render_sustained(sustained))


def _profile(bundles: list[Path], threads: int | None, json: bool) -> None:
    from rich.text import Text

    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.measure.profile import profile_bundle, render_profile

    profiles = {str(path): profile_bundle(open_bundle(path), threads) for path in bundles}
    if json:
        print_json(profiles)
        return
    for path, profile in profiles.items():
        print_shown(Text(path), render_profile(profile))


app.command("eval")(evaluation_commands.evaluate)
app.command()(bundle_commands.inspect)
app.command()(bundle_commands.pack)
app.command()(bundle_commands.sign)


@app.command("compile-schema")
def compile_schema_file(
    schema: Annotated[Path, typer.Argument(metavar="SCHEMA", help="A file with a JSON Schema.")],
) -> None:
    """Print a JSON Schema as a grammar for the phone apps, which hold replies to it.

    A part of JSON Schema is known: types, enum, const, anyOf, and the lengths of strings and
    arrays. run and chat need no compiled schema and know more; see --json-schema.
    """
    from gemma_runtime.text.schema_grammar import compile_schema, read_schema

    print_json(compile_schema(read_schema(schema)))


app.command("lm-eval")(evaluation_commands.lm_eval)
app.command()(evaluation_commands.compare)
app.command()(evaluation_commands.safety)
app.command()(report_command.report)


def main() -> None:
    """The console script."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run with the given arguments; returns the exit code."""
    return run_app(app, "gemma-runtime", arguments)
