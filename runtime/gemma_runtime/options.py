"""The arguments and options that commands share, each declared once."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_runtime.errors import BakedError

if TYPE_CHECKING:  # imported when needed, so --help starts fast
    from gemma_runtime.bundle import Bundle
    from gemma_runtime.text.baked import Baked
    from gemma_runtime.text.constraint import Constraint
    from gemma_runtime.text.opening import Opening


def _check_threads(threads: int | None) -> int | None:
    """Refuse too many threads before the bundle is read."""
    if threads is not None:
        from gemma_runtime.machine import check_threads

        check_threads(threads)
    return threads


def bundle_folder(text: str) -> Path:
    """The folder of a bundle; one given as `hub:OWNER/NAME` is downloaded first."""
    from gemma_runtime.hub import HUB_PREFIX, fetch_bundle

    is_on_hub = text.startswith(HUB_PREFIX)
    return fetch_bundle(text.removeprefix(HUB_PREFIX)) if is_on_hub else Path(text)


BundlePath = Annotated[
    Path,
    typer.Argument(
        metavar="BUNDLE",
        parser=bundle_folder,
        help="The bundle's folder, or hub:OWNER/NAME\\[@REVISION].",
    ),
]
BundlePaths = Annotated[
    list[Path],
    typer.Argument(
        metavar="BUNDLE",
        parser=bundle_folder,
        help="One or more bundles: folders, or hub:OWNER/NAME\\[@REVISION].",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, callback=_check_threads, help="Number of threads. \\[physical cores]"),
]
Json = Annotated[bool, typer.Option("--json", help="Figures as JSON on stdout.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
_TEMPERATURE = "Sampling temperature; 0 always takes the likeliest token."
_TOP_K = "Sample from the k likeliest tokens; 0 means all."
_TOP_P = "Sample from the likeliest tokens whose probabilities sum to p."
_MIN_P = "Drop tokens less likely than this share of the likeliest."
_PENALTY = "Above 1, repeated tokens become less likely."
_OWN = " \\[the bundle's]"
Temperature = Annotated[float, typer.Option(help=_TEMPERATURE)]
TopK = Annotated[int, typer.Option(help=_TOP_K)]
TopP = Annotated[float, typer.Option(help=_TOP_P)]
MinP = Annotated[float, typer.Option(help=_MIN_P)]
Penalty = Annotated[float, typer.Option(help=_PENALTY)]
OwnTemperature = Annotated[float | None, typer.Option(help=_TEMPERATURE + _OWN)]
OwnTopK = Annotated[int | None, typer.Option(help=_TOP_K + _OWN)]
OwnTopP = Annotated[float | None, typer.Option(help=_TOP_P + _OWN)]
OwnMinP = Annotated[float | None, typer.Option(help=_MIN_P + _OWN)]
OwnPenalty = Annotated[float | None, typer.Option(help=_PENALTY + _OWN)]
Draft = Annotated[
    bool,
    typer.Option(
        "--draft",
        help="Guess how repeated passages go on, and check several tokens in one step: faster "
        "where a reply copies from its prompt.",
    ),
]
Tools = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Tools that the model can call: a JSON list of schemas."),
]
BakedPath = Annotated[
    Path | None,
    typer.Option(
        "--baked",
        metavar="FILE",
        help="Start after the prefix in this file of gemma-runtime bake, without feeding it.",
    ),
]
GuardPath = Annotated[
    Path | None,
    typer.Option(
        "--guard",
        metavar="BUNDLE",
        parser=bundle_folder,
        help="A ShieldGemma bundle that checks each turn, and each reply before it is shown.",
    ),
]
GuardThreshold = Annotated[
    float | None,
    typer.Option(help="Probability from which the guard stops a turn. \\[0.5]"),
]
Roll = Annotated[
    bool,
    typer.Option("--roll", help="When the context is full, forget the oldest turns and go on."),
]
Think = Annotated[
    bool,
    typer.Option(
        "--think",
        help="Let the model think before it answers, if its chat template can ask for that. The "
        "thought is not part of the reply.",
    ),
]
Translate = Annotated[
    str | None,
    typer.Option(
        metavar="FROM:TO",
        help="The languages, for a model that only translates, e.g. en:de.",
    ),
]
Seed = Annotated[
    int | None, typer.Option(help="Seed for sampling; the same seed gives the same text.")
]
Stops = Annotated[list[str], typer.Option(help="Stop before this text. Can be repeated.")]
System = Annotated[
    str | None, typer.Option(help="System prompt: instructions before the first turn.")
]
JsonSchema = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Reply with JSON that this JSON Schema allows."),
]
Regex = Annotated[
    str | None,
    typer.Option(metavar="REGEX", help="Reply with a text that this pattern matches as a whole."),
]
Grammar = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Reply with a text of this grammar: a .lark or .gbnf file."),
]
Choices = Annotated[
    list[str], typer.Option(metavar="TEXT", help="Reply with one of these texts. Can be repeated.")
]


def read_constraint(
    json_schema: Path | None, regex: str | None, grammar: Path | None, choice: Sequence[str]
) -> "Constraint | None":
    """What the options ask of replies; None if they ask nothing."""
    from gemma_runtime.text.constraint import Constraint

    options = {
        "--json-schema": json_schema,
        "--regex": regex,
        "--grammar": grammar,
        "--choice": choice or None,
    }
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise typer.BadParameter("give one of them", param_hint=" and ".join(given))
    if json_schema is not None:
        return Constraint.read_json_schema(json_schema)
    if regex is not None:
        return Constraint.regex(regex)
    if grammar is not None:
        return Constraint.read_grammar(grammar)
    return Constraint.choice(choice) if choice else None


def open_prefix(path: Path | None, bundle: "Bundle") -> "Baked | None":
    """The baked prefix of `--baked`; None without one."""
    if path is None:
        return None
    from gemma_runtime.text.baked import open_baked

    return open_baked(path, bundle)


def choose_opening(baked: "Baked | None", system: str | None, chat: bool) -> "Opening":
    """What a prompt of `run` begins with."""
    from gemma_runtime.text.opening import Opening

    if system is not None and (baked is not None or not chat):
        reason = "is in the file of --baked" if baked is not None else "goes with --chat"
        raise typer.BadParameter(reason, param_hint="--system")
    if baked is None:
        return Opening(system=system) if chat else Opening(text="")
    if chat is not (baked.opening.text is None):
        raise BakedError(
            f"{baked.path} is the beginning of a chat; add --chat"
            if not chat
            else f"{baked.path} is a text for prompts; leave --chat out"
        )
    return baked.opening
