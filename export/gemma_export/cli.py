"""`gemma-export`: turns flags into an ExportRequest and runs it.

The values of --target and the flags of single targets come from the targets' own declarations.
torch is imported last, so wrong flags fail at once, even without torch.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_export import cache_command, push_command
from gemma_export.model.families import ENCODERS, FAMILIES
from gemma_export.options import (
    AUTO,
    TARGET_PANEL,
    Adapter,
    Base,
    Bits,
    Cache,
    Calibration,
    Checkpoint,
    Config,
    Context,
    Device,
    EvalText,
    Family,
    Force,
    FullCache,
    Json,
    MaxRam,
    MaxVram,
    Output,
    PlanOnly,
    Prefill,
    Quant,
    RecipeFile,
    RequireExact,
    Revision,
    Size,
    Version,
    completing,
)
from gemma_export.ranks import first_prints, refuse_ranks, stay_if_failed
from gemma_export.search import command as search_command
from gemma_export.targets import TARGETS, all_targets, require_packages
from gemma_export.targets.spec import Option
from gemma_runtime.command import run_app
from gemma_runtime.errors import nearest_first

if TYPE_CHECKING:
    from gemma_export.embedding.pipeline import EmbeddingResult
    from gemma_export.embedding.plan import EmbeddingPlan
    from gemma_export.pipeline import ExportResult
    from gemma_export.plan import Plan
    from gemma_export.quantize.recipe import Recipe
    from gemma_export.request import ExportRequest

app = typer.Typer(
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    subcommand_metavar="[COMMAND]",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cache_command.app, name="cache")
app.command("push")(push_command.push)
app.command("search")(search_command.search)

_HELP = """Turn a Gemma checkpoint into a bundle that a phone, a laptop or a board can run.

A bundle is a folder: the artifact, the tokenizer, goldens, and manifest.json. Run and check it
with [bold]gemma-runtime[/bold].

[bold]Examples[/bold]

  gemma-export --target onnx --size 2b

  gemma-export --target onnx --checkpoint ./my-fine-tune --quant int8 --context 8192

  gemma-export --target onnx --checkpoint model.gguf --output out/phone

  gemma-export --size 27b --plan            (sizes and memory; reads no weights)

  gemma-export --target onnx --size 9b --checkpoint random:7 --max-ram 2GiB

  gemma-export cache list                   (entries of the cache, with size and age)

  gemma-export search search.yaml           (many bundles, and the one to take)

  gemma-export push out/gemma owner/name    (a private repository on the hub)

Exit codes: 0 success, 1 error (one line with the reason and what to do), 2 wrong usage.
"""


def export(
    ctx: typer.Context,
    *,
    checkpoint: Checkpoint = None,
    base: Base = None,
    adapter: Adapter = None,
    size: Size = None,
    family: Family = None,
    revision: Revision = None,
    config: Config = None,
    quant: Quant = "auto",
    recipe: RecipeFile = None,
    bits: Bits = None,
    calibration: Calibration = None,
    require_exact: RequireExact = False,
    context: Context = None,
    prefill: Prefill = None,
    full_cache: FullCache = False,
    cache: Cache = None,
    target: str = "onnx",
    output: Output = None,
    force: Force = False,
    max_ram: MaxRam = None,
    device: Device = "auto",
    max_vram: MaxVram = None,
    eval_text: EvalText = None,
    plan: PlanOnly = False,
    json: Json = False,
    version: Version = False,
    **options: str | None,  # options of single targets
) -> None:
    del version
    if ctx.invoked_subcommand is not None:
        refuse_ranks(f"gemma-export {ctx.invoked_subcommand}")
        return
    if plan:
        refuse_ranks("--plan")
    from gemma_export.memory import parse_bytes
    from gemma_export.request import ExportRequest

    request = ExportRequest(
        targets=_targets(target),
        recipe=_recipe(quant),
        checkpoint=checkpoint,
        base=base,
        adapters=tuple(adapter or ()),
        size=size,
        family=_family(family),
        config_file=config,
        revision=revision,
        context_length=context,
        prefill_length=prefill,
        full_cache=full_cache,
        cache=cache,
        options=_given(options),
        output=output,
        max_ram=parse_bytes(max_ram) if max_ram else None,
        device=device,
        max_vram=parse_bytes(max_vram) if max_vram else None,
        force=force,
        require_exact=require_exact,
        eval_text=eval_text,
        calibration=calibration,
        bits=bits,
    )
    _run(request, recipe, plan, json)


def _run(request: "ExportRequest", recipe: Path | None, plan: bool, json: bool) -> None:
    """Plan or export, after every check that needs no torch."""
    from gemma_export.planning import plan_model
    from gemma_export.quantize.recipe import load_recipe
    from gemma_export.request import check_request

    check_request(request)
    if request.checkpoint is None and request.size is None:
        print(
            "error: no checkpoint: give --size, e.g. 2b, or --checkpoint; gemma-export --help "
            "lists all flags",
            file=sys.stderr,
        )
        raise typer.Exit(2)
    if not plan:
        for name in request.targets:
            require_packages(name)
    if recipe is not None:
        request = replace(request, recipe=load_recipe(recipe))
    if plan:
        _print_plans(plan_model(request), json)
    else:
        _print_results(_export(request, json), json)


def main() -> None:
    """Console script. Prints a GemmaError as one line on stderr and exits with code 1."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run with the given arguments; returns the exit code."""
    with first_prints():
        code = run_app(command_line(), "gemma-export", arguments)
    stay_if_failed(code)
    return code


def command_line() -> typer.Typer:
    """The command line, including the flags that targets declare."""
    app.callback(invoke_without_command=True, help=_HELP)(_with_target_flags())
    return app


def _with_target_flags() -> Callable[..., None]:
    """`export` with a signature that typer can read: --target and the targets' own flags."""

    def command(ctx: typer.Context, **values: object) -> None:
        export(ctx, **values)  # type: ignore[arg-type]

    known = signature(export).parameters.values()
    flags = [flag for flag in known if flag.kind is not Parameter.VAR_KEYWORD]
    own = [_flag(option) for spec in all_targets() for option in spec.options]
    place = [flag.name for flag in flags].index("target")
    flags[place : place + 1] = [flags[place].replace(annotation=_target_annotation()), *own]
    command.__signature__ = signature(export).replace(parameters=flags)  # type: ignore[attr-defined]
    return command


def _flag(option: Option) -> Parameter:
    shown = typer.Option(
        option.flag,
        rich_help_panel=TARGET_PANEL,
        help=option.help,
        autocompletion=completing(option.choices),
    )
    annotation = Annotated[str | None, shown]
    return Parameter(
        option.name, Parameter.KEYWORD_ONLY, default=option.default, annotation=annotation
    )


def _target_annotation() -> object:
    specs = all_targets()
    stable = ", ".join(f"{spec.name} ({spec.label})" for spec in specs if not spec.is_beta)
    in_all = ", ".join(spec.name for spec in specs if spec.is_in_all)
    betas = ", ".join(f"{spec.name} ({spec.label})" for spec in specs if spec.is_beta)
    shown = typer.Option(
        rich_help_panel=TARGET_PANEL,
        help=f"Runtime to export for: {stable}; in beta: {betas}. Separate several with commas; "
        f"all means those that run on a device: {in_all}.",
        autocompletion=completing([*TARGETS, "all"]),
    )
    return Annotated[str, shown]


def _targets(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if names == ("all",):
        return tuple(spec.name for spec in all_targets() if spec.is_in_all)
    for name in names or ("",):
        if name not in TARGETS:
            raise typer.BadParameter(_choices(name, TARGETS), param_hint="--target")
    return names


def _recipe(name: str) -> "Recipe | None":
    from gemma_export.quantize.recipe import RECIPES

    if name == AUTO:
        return None
    if name not in RECIPES:
        raise typer.BadParameter(_choices(name, (AUTO, *RECIPES)), param_hint="--quant")
    return RECIPES[name]


def _family(name: str | None) -> str | None:
    known = (*FAMILIES, *ENCODERS)
    if name is not None and name not in known:
        raise typer.BadParameter(_choices(name, known), param_hint="--family")
    return name


def _choices(name: str, choices: Iterable[str]) -> str:
    return f"{name!r} is unknown; choose from {nearest_first(name, choices)}"


def _given(options: Mapping[str, str | None]) -> dict[str, str]:
    """The options that differ from the targets' defaults."""
    defaults = {option.name: option.default for spec in all_targets() for option in spec.options}
    return {
        name: value
        for name, value in options.items()
        if value is not None and value != defaults[name]
    }


def _export(request: "ExportRequest", json: bool) -> "list[ExportResult | EmbeddingResult]":
    from rich.console import Console

    from gemma_export.pipeline import export_model
    from gemma_export.progress import ConsoleReporter, QuietReporter

    report = QuietReporter() if json else ConsoleReporter(Console(stderr=True))
    return export_model(request, report)


def _print_plans(plans: "list[Plan] | list[EmbeddingPlan]", json: bool) -> None:
    if json:
        _print_json(plans)
        return
    from rich.console import Console

    from gemma_export.plan_table import render_plan

    for plan in plans:
        Console().print(render_plan(plan))


def _print_results(results: "list[ExportResult | EmbeddingResult]", json: bool) -> None:
    from gemma_export.pipeline import ExportResult
    from gemma_export.summary import render_summary, summarize, summarize_embedding

    summaries = [
        summarize(result) if isinstance(result, ExportResult) else summarize_embedding(result)
        for result in results
    ]
    if json:
        _print_json(summaries)
        return
    from rich.console import Console

    for summary in summaries:
        Console().print(render_summary(summary))


def _print_json(value: object) -> None:
    import msgspec

    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
