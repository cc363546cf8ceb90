"""`gemma-export`: flags to an ExportRequest, then one call."""

import sys
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from gemma_export import cache_command
from gemma_runtime.command import run_app
from gemma_runtime.errors import nearest_first
from gemma_runtime.manifest import Agreement

if TYPE_CHECKING:
    from gemma_export.pipeline import ExportResult
    from gemma_export.plan import Plan
    from gemma_export.quantize.recipe import Recipe

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_HELP = """Turn a Gemma checkpoint into a bundle that a phone, a laptop or a board can run.

A bundle is a folder: the artifact, the tokenizer, goldens, and manifest.json. Run and check it
with [bold]gemma-runtime[/bold].

[bold]Examples[/bold]

  gemma-export --target onnx --size 2b

  gemma-export --target onnx --checkpoint ./my-fine-tune --quant int8 --context 8192

  gemma-export --target onnx --checkpoint model.gguf --output out/phone

  gemma-export --size 27b --plan            (sizes and memory; reads no weights)

  gemma-export --target onnx --size 9b --checkpoint random:7 --max-ram 2GiB

  gemma-export cache list                   (what exports keep, and how to remove it)

Exit codes: 0 done, 1 refused (one line says why and what to do), 2 wrong usage.
"""


class _Family(StrEnum):
    GEMMA2 = "gemma2"
    GEMMA3 = "gemma3"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gemma-export {metadata.version('gemma-export')}")
        raise typer.Exit


app.add_typer(cache_command.app, name="cache")


@app.callback(help=_HELP, invoke_without_command=True)
def export(
    context_of: typer.Context,
    target: Annotated[
        str,
        typer.Option(
            help="Where it shall run: onnx, executorch, coreml, gguf. Several with commas, or all."
        ),
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
            "270M of the \\[demo] extra). Without it, --size is fetched from the hub."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A config.json: the shape of random weights.")
    ] = None,
    quant: Annotated[
        str,
        typer.Option(
            help="Recipe: int4, int4-asym, int4-table8 or mixed, each alone or calibrated "
            "(int4-gptq, int4-distilled, …); int8, int8-channel, none; source "
            "keeps a quantized checkpoint's codes (Q4_0, Q8_0, Q5_0, GPTQ, AWQ, QAT) and names "
            "what it can't keep."
        ),
    ] = "int4",
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file: tensor patterns → bits, group, asymmetric, fine, rounding."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text for the -gptq and -distilled recipes: a file or a folder."),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Most bits per weight: --quant's int4, and int8 where measuring says it saves "
            "most. The choice is in the bundle's recipe.yaml, for --recipe."
        ),
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
    delegate: Annotated[
        str,
        typer.Option(
            help="What an ExecuTorch program runs on: xnnpack, vulkan, coreml. The last two are "
            "lowered here and were never run."
        ),
    ] = "xnnpack",
    coreml_compute: Annotated[
        str,
        typer.Option(
            help="What a Core ML package is laid out for: gpu, or ane (the Neural Engine; never "
            "run on one)."
        ),
    ] = "gpu",
    coreml_embed: Annotated[
        str | None,
        typer.Option(
            help="Where a Core ML bundle keeps the embedding: inside the model, or external, a "
            "file that the app maps. \\[inside for gpu, external for ane]"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The bundle's folder. \\[out/MODEL-QUANT-TARGET]")
    ] = None,
    max_ram: Annotated[
        str | None, typer.Option(help="Memory the export keeps to, e.g. 6GiB, or it refuses.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print sizes, caches, memory and phones; then stop.")
    ] = False,
    require_exact: Annotated[
        bool,
        typer.Option("--require-exact", help="Fail, by name, if a tensor had to be rounded."),
    ] = False,
    eval_text: Annotated[
        Path | None,
        typer.Option(
            help="A file or folder of text: keep what the float32 weights say of it, for "
            "gemma-runtime eval."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle at --output.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Figures as JSON on stdout.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if context_of.invoked_subcommand:
        return
    # Imported here: torch takes seconds, and --help shall not wait for it.
    from gemma_export import pipeline
    from gemma_export.memory import parse_bytes
    from gemma_export.progress import ConsoleReporter, QuietReporter
    from gemma_export.targets import TargetOptions

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
        options=TargetOptions(delegate, coreml_compute, coreml_embed),
        output=output,
        max_ram=parse_bytes(max_ram) if max_ram else None,
        force=force,
        require_exact=require_exact,
        eval_text=eval_text,
        calibration=calibration,
        bits=bits,
    )
    if plan:
        _print_plans(pipeline.plan_exports(request), json)
        return
    report = QuietReporter() if json else ConsoleReporter(Console(stderr=True))
    _print_results(pipeline.export_bundles(request, report), json)


def main() -> None:
    """The console script: a GemmaError is one line on stderr and exit code 1."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run with the given arguments; returns the exit code."""
    return run_app(app, "gemma-export", arguments)


def _targets(text: str) -> tuple[str, ...]:
    from gemma_export.targets import BETAS, TARGETS

    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if names == ("all",):
        return tuple(name for name in TARGETS if name not in BETAS)
    for name in names or ("",):
        if name not in TARGETS:
            raise typer.BadParameter(_choices(name, list(TARGETS)), param_hint="--target")
    return names


def _recipe(quant: str, file: Path | None) -> "Recipe":
    from gemma_export.quantize.recipe import RECIPES, load_recipe

    if file is not None:
        return load_recipe(file)
    if quant not in RECIPES:
        raise typer.BadParameter(_choices(quant, list(RECIPES)), param_hint="--quant")
    return RECIPES[quant]


def _choices(found: str, choices: list[str]) -> str:
    return f"no {found!r}; choose from {nearest_first(found, choices)}"


def _print_plans(plans: "list[Plan]", json: bool) -> None:
    from gemma_export.plan_table import render_plan

    if json:
        sys.stdout.buffer.write(msgspec.json.encode(plans) + b"\n")
        return
    for plan in plans:
        Console().print(render_plan(plan))


def _print_results(results: "list[ExportResult]", json: bool) -> None:
    summaries = [_summary(result) for result in results]
    if json:
        sys.stdout.buffer.write(msgspec.json.encode(summaries) + b"\n")
        return
    for summary in summaries:
        table = Table(show_header=False, box=None, title=summary.bundle, title_justify="left")
        for label, value in _lines(summary):
            table.add_row(label, value)
        Console().print(table)


def _summary(result: "ExportResult") -> "_Summary":
    manifest = result.bundle.manifest
    return _Summary(
        bundle=str(result.bundle.directory),
        target=manifest.target.name,
        model=manifest.model.id,
        recipe=manifest.quantization.recipe,
        bits_per_weight=manifest.quantization.bits_per_weight,
        codes_digest=manifest.quantization.codes_digest,
        bytes=sum(file.bytes for file in manifest.files.values()),
        context_length=manifest.context_length,
        quality=manifest.quality,
        seconds=result.seconds,
        peak_rss_bytes=result.peak_rss_bytes,
    )


@dataclass(frozen=True, slots=True)
class _Summary:
    """What one export tells, on the console and as JSON."""

    bundle: str
    target: str
    model: str
    recipe: str
    bits_per_weight: float
    codes_digest: str
    bytes: int
    context_length: int
    quality: Agreement  # quantized against float32, both in the reference
    seconds: float
    peak_rss_bytes: int


def _lines(summary: _Summary) -> list[tuple[str, str]]:
    from gemma_runtime.machine import format_bytes

    quality = summary.quality
    return [
        ("model", summary.model),
        ("weights", f"{summary.recipe}, {summary.bits_per_weight:.2f} bits"),
        ("size", format_bytes(summary.bytes)),
        ("context", f"{summary.context_length} tokens"),
        (
            "quality",
            f"KL {quality.mean_kl:.4f}, top-1 {quality.top1:.1%} to the float32 weights, "
            f"over {quality.positions} golden tokens",
        ),
        ("export", f"{summary.seconds:.1f} s, peak {format_bytes(summary.peak_rss_bytes)}"),
        ("next", f"gemma-runtime verify {summary.bundle}"),
    ]
