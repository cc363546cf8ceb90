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
from gemma_export.device import DEVICES
from gemma_export.model.families import FAMILIES
from gemma_export.ranks import first_prints, refuse_ranks, stay_if_failed
from gemma_export.search import command as search_command
from gemma_export.targets import TARGETS, all_targets, require_packages
from gemma_export.targets.spec import Option
from gemma_runtime.command import run_app
from gemma_runtime.errors import nearest_first
from gemma_runtime.manifest import CACHE_WIDTHS

if TYPE_CHECKING:
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


def _print_version(is_given: bool) -> None:
    if is_given:
        from importlib import metadata

        print(f"gemma-export {metadata.version('gemma-export')}")
        raise typer.Exit


def _completing(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """A function that completes the value of a flag with these choices."""
    known = list(choices)

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in known if choice.startswith(incomplete)]

    return complete


def _complete_recipe(incomplete: str) -> list[str]:
    from gemma_export.quantize.recipe import RECIPES

    return _completing((_AUTO, *RECIPES))(incomplete)


_SIZES = dict.fromkeys(size for family in FAMILIES.values() for size in family.sizes)
_SIZES_HELP = "; ".join(f"{' '.join(f.sizes)} ({f.title})" for f in FAMILIES.values())

_AUTO = "auto"  # the value of --quant that chooses a recipe

# The panels of --help.
_MODEL, _QUANTIZATION, _LAYOUT = "Model", "Quantization", "Layout"
_TARGET, _OUTPUT = "Target options", "Output"

_Checkpoint = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MODEL,
        help="A Hugging Face folder, a hub id or URL, a .gguf file, owner/name:PATTERN (one GGUF "
        "model of a hub repository), a LoRA adapter, random\\[:SEED], or demo (the Gemma 3 "
        "270M of the \\[demo] extra). By default, --size is downloaded from the hub.",
    ),
]
_Base = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MODEL,
        help="The model of a LoRA adapter given as --checkpoint: a folder or a hub id. \\[the one "
        "that its adapter_config.json names]",
    ),
]
_Adapter = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=_MODEL,
        metavar="FOLDER[=WEIGHT]",
        help="A LoRA adapter (PEFT), a folder or a hub id, merged into the model; may be given "
        "several times. WEIGHT scales it; 1 is usual.",
    ),
]
_Size = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MODEL,
        help=f"An official size: {_SIZES_HELP}.",
        autocompletion=_completing(_SIZES),
    ),
]
_Family = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MODEL,
        help=f"Family, if several have this --size: {', '.join(FAMILIES)}. \\[the first of them]",
        autocompletion=_completing(FAMILIES),
    ),
]
_Revision = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MODEL,
        help="Branch, tag or commit of the checkpoint on the hub. \\[its default branch]",
    ),
]
_Config = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_MODEL,
        help="A config.json that gives the model's shapes, for --checkpoint random.",
    ),
]
_Quant = Annotated[
    str,
    typer.Option(
        rich_help_panel=_QUANTIZATION,
        help="Recipe: auto chooses one for model and targets, and says why. int4, int4-g64, "
        "int4-g128, int4-asym, int4-table8 or mixed, each alone or calibrated (int4-gptq, "
        "int4-distilled, …); int8, int8-channel, each alone or smoothed (int8-smooth, …); none; "
        "source keeps a quantized checkpoint's codes (Q4_0, Q8_0, Q5_0, GPTQ, AWQ, "
        "compressed-tensors, QAT) and lists what it can't keep.",
        autocompletion=_complete_recipe,
    ),
]
_RecipeFile = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_QUANTIZATION,
        help="Your own recipe, a YAML file: tensor patterns → bits, group, asymmetric, "
        "int8_columns, rounding, smooth.",
    ),
]
_Bits = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_QUANTIZATION,
        help="Most bits per weight on average: --quant's int4, with int8 where it is measured to "
        "help most. The bundle's recipe.yaml stores the choice; --recipe reads it.",
    ),
]
_Calibration = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_QUANTIZATION,
        help="Text for --bits, the calibrated recipes and --cache int8: a file or a folder. "
        "\\[the text included in gemma-export]",
    ),
]
_RequireExact = Annotated[
    bool,
    typer.Option(
        "--require-exact",
        rich_help_panel=_QUANTIZATION,
        help="Fail if a tensor can't be kept exactly, and list such tensors.",
    ),
]
_Context = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_LAYOUT,
        help="Context length: tokens that the KV caches hold. \\[4096, or the model's limit]",
    ),
]
_Prefill = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_LAYOUT,
        help="Longest chunk of a prompt, in tokens. \\[512]",
    ),
]
_FullCache = Annotated[
    bool,
    typer.Option(
        "--full-cache",
        rich_help_panel=_LAYOUT,
        help="Give local layers caches for the whole context too, for older runtimes.",
    ),
]
_Cache = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_LAYOUT,
        help="Type of the KV caches. int8 (only onnx) takes a quarter of float32's memory; its "
        "scales are measured on --calibration. \\[float32; float16 if the target has no other]",
        autocompletion=_completing(CACHE_WIDTHS),
    ),
]
_Output = Annotated[
    Path | None,
    typer.Option(rich_help_panel=_OUTPUT, help="The bundle's folder. \\[out/MODEL-QUANT-TARGET]"),
]
_Force = Annotated[
    bool,
    typer.Option("--force", rich_help_panel=_OUTPUT, help="Replace the bundle at --output."),
]
_MaxRam = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_OUTPUT,
        help="Memory limit of the export, e.g. 6GiB. It stops rather than use more.",
    ),
]
_Device = Annotated[
    str,
    typer.Option(
        rich_help_panel=_OUTPUT,
        help="What runs the reference and calibration: cpu, cuda, cuda:N or mps. auto takes those "
        "that were measured: so far cpu alone.",
        autocompletion=_completing(DEVICES),
    ),
]
_MaxVram = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_OUTPUT,
        help="Memory limit of --device, e.g. 12GiB. It stops rather than use more.",
    ),
]
_EvalText = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_OUTPUT,
        help="A file or folder of text: store the float32 model's probabilities for it, for "
        "gemma-runtime eval.",
    ),
]
_Plan = Annotated[
    bool,
    typer.Option(
        "--plan",
        rich_help_panel=_OUTPUT,
        help="Print sizes, caches, memory and which phones can run the bundle, then exit.",
    ),
]
_Json = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=_OUTPUT, help="Print the results as JSON on stdout."),
]
_Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
]


def export(
    ctx: typer.Context,
    *,
    checkpoint: _Checkpoint = None,
    base: _Base = None,
    adapter: _Adapter = None,
    size: _Size = None,
    family: _Family = None,
    revision: _Revision = None,
    config: _Config = None,
    quant: _Quant = "auto",
    recipe: _RecipeFile = None,
    bits: _Bits = None,
    calibration: _Calibration = None,
    require_exact: _RequireExact = False,
    context: _Context = None,
    prefill: _Prefill = None,
    full_cache: _FullCache = False,
    cache: _Cache = None,
    target: str = "onnx",
    output: _Output = None,
    force: _Force = False,
    max_ram: _MaxRam = None,
    device: _Device = "auto",
    max_vram: _MaxVram = None,
    eval_text: _EvalText = None,
    plan: _Plan = False,
    json: _Json = False,
    version: _Version = False,
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
    from gemma_export.quantize.recipe import load_recipe
    from gemma_export.request import check_request, plan_exports

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
        _print_plans(plan_exports(request), json)
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
        rich_help_panel=_TARGET,
        help=option.help,
        autocompletion=_completing(option.choices),
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
        rich_help_panel=_TARGET,
        help=f"Runtime to export for: {stable}; in beta: {betas}. Separate several with commas; "
        f"all means those that run on a device: {in_all}.",
        autocompletion=_completing([*TARGETS, "all"]),
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

    if name == _AUTO:
        return None
    if name not in RECIPES:
        raise typer.BadParameter(_choices(name, (_AUTO, *RECIPES)), param_hint="--quant")
    return RECIPES[name]


def _family(name: str | None) -> str | None:
    if name is not None and name not in FAMILIES:
        raise typer.BadParameter(_choices(name, FAMILIES), param_hint="--family")
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


def _export(request: "ExportRequest", json: bool) -> "list[ExportResult]":
    from rich.console import Console

    from gemma_export.pipeline import export_bundles
    from gemma_export.progress import ConsoleReporter, QuietReporter

    report = QuietReporter() if json else ConsoleReporter(Console(stderr=True))
    return export_bundles(request, report)


def _print_plans(plans: "list[Plan]", json: bool) -> None:
    if json:
        _print_json(plans)
        return
    from rich.console import Console

    from gemma_export.plan_table import render_plan

    for plan in plans:
        Console().print(render_plan(plan))


def _print_results(results: "list[ExportResult]", json: bool) -> None:
    from gemma_export.summary import render_summary, summarize

    summaries = [summarize(result) for result in results]
    if json:
        _print_json(summaries)
        return
    from rich.console import Console

    for summary in summaries:
        Console().print(render_summary(summary))


def _print_json(value: object) -> None:
    import msgspec

    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
