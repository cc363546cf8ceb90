"""`gemma-export`: flags to an ExportRequest, then one call."""

import sys
from difflib import get_close_matches
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from gemma_runtime.errors import GemmaError, RecipeError, TargetError

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

_HELP = """Turn a Gemma checkpoint into a bundle that a phone, a laptop or a board can run.

A bundle is a folder: the artifact, the tokenizer, goldens, and manifest.json. Run and check it
with [bold]gemma-runtime[/bold].

[bold]Examples[/bold]

  gemma-export --target onnx --size 2b

  gemma-export --target onnx --checkpoint ./my-fine-tune --quant int8 --context 8192

  gemma-export --target onnx --checkpoint model.gguf --output out/phone

  gemma-export --size 27b --plan            (sizes and memory; reads no weights)

  gemma-export --target onnx --size 9b --checkpoint random:7 --max-ram 2GiB

Exit codes: 0 done, 1 refused (one line says why and what to do), 2 wrong usage.
"""


class _Family(StrEnum):
    GEMMA2 = "gemma2"
    GEMMA3 = "gemma3"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gemma-export {metadata.version('gemma-export')}")
        raise typer.Exit


@app.command(help=_HELP)
def export(
    target: Annotated[
        str, typer.Option(help="Where it shall run: onnx. Several with commas, or all.")
    ] = "onnx",
    size: Annotated[
        str | None,
        typer.Option(help="Official size: 2b 9b 27b (Gemma 2), 270m 1b 4b 12b (Gemma 3 text)."),
    ] = None,
    family: Annotated[
        _Family | None, typer.Option(help="Tells the two 27b apart; gemma2 unless given.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face folder, hub id, .gguf file, random[:SEED], or demo (the Gemma 3 "
            "270M of the [demo] extra). Without it, --size is fetched from the hub."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A config.json: the shape of random weights.")
    ] = None,
    quant: Annotated[
        str, typer.Option(help="Recipe: int4, int4-asym, mixed, int8, none.")
    ] = "int4",
    recipe: Annotated[
        Path | None,
        typer.Option(help="A YAML file: tensor patterns → bits, group, asymmetric, rounding."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens the caches hold. [4096, or the model's limit]")
    ] = None,
    prefill: Annotated[
        int | None, typer.Option(help="Longest chunk of a prompt, in tokens. [512]")
    ] = None,
    full_cache: Annotated[
        bool,
        typer.Option(help="Keep the whole context on local layers too: runs on older runtimes."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="The bundle's folder. [out/MODEL-QUANT-TARGET]")
    ] = None,
    max_ram: Annotated[
        str | None, typer.Option(help="Memory the export keeps to, e.g. 6GiB, or it refuses.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print sizes, caches, memory and phones; then stop.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle at --output.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Figures as JSON on stdout.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    # Imported here: torch takes seconds, and --help shall not wait for it.
    from gemma_export import pipeline
    from gemma_export.memory import parse_bytes
    from gemma_export.progress import ConsoleReporter, QuietReporter

    request = pipeline.ExportRequest(
        targets=_targets(target),
        recipe=_recipe(quant, recipe),
        checkpoint=checkpoint,
        size=size,
        family=family.value if family else None,
        config_file=config,
        context_length=context,
        prefill_length=prefill,
        full_cache=full_cache,
        output=output,
        max_ram=parse_bytes(max_ram) if max_ram else None,
        force=force,
    )
    if plan:
        _print_plans(pipeline.plan_exports(request), json)
        return
    report = QuietReporter() if json else ConsoleReporter(Console(stderr=True))
    _print_results(pipeline.export_bundles(request, report), json)
