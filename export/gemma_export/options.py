"""The flags of `gemma-export`, but for --target and those that targets declare.

The values of --size, --family and others come from the tables that know them.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from gemma_export.device import DEVICES
from gemma_export.model.families import ENCODERS, FAMILIES
from gemma_runtime.manifest import CACHE_WIDTHS


def _print_version(is_given: bool) -> None:
    if is_given:
        from importlib import metadata

        print(f"gemma-export {metadata.version('gemma-export')}")
        raise typer.Exit


def completing(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """A function that completes the value of a flag with these choices."""
    known = list(choices)

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in known if choice.startswith(incomplete)]

    return complete


def _complete_recipe(incomplete: str) -> list[str]:
    from gemma_export.quantize.recipe import RECIPES

    return completing((AUTO, *RECIPES))(incomplete)


_FAMILIES = {**FAMILIES, **ENCODERS}
_SIZES = dict.fromkeys(size for family in _FAMILIES.values() for size in family.sizes)
_SIZES_HELP = "; ".join(f"{' '.join(f.sizes)} ({f.title})" for f in _FAMILIES.values())

AUTO = "auto"  # the value of --quant that chooses a recipe

# The panels of --help.
_MODEL, _QUANTIZATION, _LAYOUT = "Model", "Quantization", "Layout"
TARGET_PANEL, _OUTPUT = "Target options", "Output"

Checkpoint = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MODEL,
        help="A Hugging Face folder, a hub id or URL, a .gguf file, owner/name:PATTERN (one GGUF "
        "model of a hub repository), a LoRA adapter, random\\[:SEED], or demo (the Gemma 3 "
        "270M of the \\[demo] extra). By default, --size is downloaded from the hub.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MODEL,
        help="The model of a LoRA adapter given as --checkpoint: a folder or a hub id. \\[the one "
        "that its adapter_config.json names]",
    ),
]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=_MODEL,
        metavar="FOLDER[=WEIGHT]",
        help="A LoRA adapter (PEFT), a folder or a hub id, merged into the model; may be given "
        "several times. WEIGHT scales it; 1 is usual.",
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MODEL,
        help=f"An official size: {_SIZES_HELP}.",
        autocompletion=completing(_SIZES),
    ),
]
Family = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MODEL,
        help=f"Family, if several have this --size: {', '.join(_FAMILIES)}. \\[the first of them]",
        autocompletion=completing(_FAMILIES),
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_MODEL,
        help="Branch, tag or commit of the checkpoint on the hub. \\[its default branch]",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_MODEL,
        help="A config.json that gives the model's shapes, for --checkpoint random.",
    ),
]
Quant = Annotated[
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
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_QUANTIZATION,
        help="Your own recipe, a YAML file: tensor patterns → bits, group, asymmetric, "
        "int8_columns, rounding, smooth.",
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=_QUANTIZATION,
        help="Most bits per weight on average: --quant's int4, with int8 where it is measured to "
        "help most. The bundle's recipe.yaml stores the choice; --recipe reads it.",
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_QUANTIZATION,
        help="Text for --bits, the calibrated recipes and --cache int8: a file or a folder. "
        "\\[the text included in gemma-export]",
    ),
]
RequireExact = Annotated[
    bool,
    typer.Option(
        "--require-exact",
        rich_help_panel=_QUANTIZATION,
        help="Fail if a tensor can't be kept exactly, and list such tensors.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_LAYOUT,
        help="Context length: tokens that the KV caches hold. \\[4096, or the model's limit]",
    ),
]
Prefill = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_LAYOUT,
        help="Longest chunk of a prompt, in tokens. \\[512]",
    ),
]
FullCache = Annotated[
    bool,
    typer.Option(
        "--full-cache",
        rich_help_panel=_LAYOUT,
        help="Give local layers caches for the whole context too, for older runtimes.",
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_LAYOUT,
        help="Type of the KV caches. int8 (only onnx) takes a quarter of float32's memory; its "
        "scales are measured on --calibration. \\[float32; float16 if the target has no other]",
        autocompletion=completing(CACHE_WIDTHS),
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(rich_help_panel=_OUTPUT, help="The bundle's folder. \\[out/MODEL-QUANT-TARGET]"),
]
Force = Annotated[
    bool,
    typer.Option("--force", rich_help_panel=_OUTPUT, help="Replace the bundle at --output."),
]
MaxRam = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_OUTPUT,
        help="Memory limit of the export, e.g. 6GiB. It stops rather than use more.",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        rich_help_panel=_OUTPUT,
        help="What runs the reference and calibration: cpu, cuda, cuda:N or mps. auto takes those "
        "that were measured: so far cpu alone.",
        autocompletion=completing(DEVICES),
    ),
]
MaxVram = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_OUTPUT,
        help="Memory limit of --device, e.g. 12GiB. It stops rather than use more.",
    ),
]
EvalText = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=_OUTPUT,
        help="A file or folder of text: store the float32 model's probabilities for it, for "
        "gemma-runtime eval.",
    ),
]
PlanOnly = Annotated[
    bool,
    typer.Option(
        "--plan",
        rich_help_panel=_OUTPUT,
        help="Print sizes, caches, memory and which phones can run the bundle, then exit.",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=_OUTPUT, help="Print the results as JSON on stdout."),
]
Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
]
