"""The commands `bake` and `baked`: write and list files that sessions start from."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_runtime.command import print_json
from gemma_runtime.errors import BakedError
from gemma_runtime.options import BundlePath, Json, Threads, Tools

if TYPE_CHECKING:  # imported when needed, so --help starts fast
    from gemma_runtime.bundle import Bundle
    from gemma_runtime.text.baked import Baking
    from gemma_runtime.text.opening import Opening

_SHOWN = 60  # characters of an opening


@dataclass(frozen=True, slots=True)
class Listed:
    """A file of baked prefixes, and whether it is of this bundle, made here."""

    file: str
    fits: bool
    reason: str | None  # why it doesn't fit
    tokens: int | None  # None if the file can't be read
    bytes: int | None
    begins: str | None


def bake(
    bundle: BundlePath,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The file to write, e.g. helper.safetensors.")
    ],
    system: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file with the system prompt of chats.")
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Turns that chats begin with: a JSON list of turns, each with role (user or "
            "assistant) and content.",
        ),
    ] = None,
    tools: Tools = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A file with the text that prompts of run begin with."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Compute the fixed beginning of prompts once, and store its caches in a file.

    run and chat start from it with --baked, instead of feeding it. The file is of this bundle, this
    version of the runtime and this kind of processor; elsewhere it is refused.
    """
    opening = _read_opening(system, examples, tools, text)  # a usage error loads nothing

    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.session import open_session
    from gemma_runtime.text.baked import bake
    from gemma_runtime.text.tokenizer import load_tokenizer

    if file.exists() and not force:
        raise BakedError(f"{file} exists; give another file, or --force to replace it")
    opened = open_bundle(bundle)
    tokenizer = load_tokenizer(opened)
    with open_session(opened, threads) as session:
        baking = bake(opened, session, tokenizer, opening, file, force)
    if json:
        print_json(baking)
    else:
        print(_told(baking))


def baked(
    bundle: BundlePath,
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Files of bake.")],
    json: Json = False,
) -> None:
    """List baked prefixes: what is in them, and whether this bundle can start from them here.

    The exit code is 1 if one of them does not fit.
    """
    from gemma_runtime.bundle import open_bundle

    opened = open_bundle(bundle)
    listed = [_list(file, opened) for file in files]
    if json:
        print_json(listed)
    else:
        for one in listed:
            print(_line(one))
    if not all(one.fits for one in listed):
        raise typer.Exit(1)


def _read_opening(
    system: Path | None, examples: Path | None, tools: Path | None, text: Path | None
) -> "Opening":
    is_chat = any((system, examples, tools))
    if is_chat is (text is not None):
        reason = "goes without the others" if is_chat else "give one of them"
        raise typer.BadParameter(
            reason, param_hint="--text" if is_chat else "--system, --examples, --tools or --text"
        )
    from gemma_runtime.text.opening import Opening, read_examples, read_text
    from gemma_runtime.text.tools import read_tools

    return Opening(
        text=read_text(text) if text else None,
        system=read_text(system) if system else None,
        examples=read_examples(examples) if examples else (),
        tools=tuple(read_tools(tools)) if tools else (),
    )


def _told(baking: "Baking") -> str:
    from gemma_runtime.machine import format_bytes

    return (
        f"{baking.file}: {baking.tokens} tokens, {format_bytes(baking.bytes)}; feeding them takes "
        f"{baking.feed_seconds * 1e3:.0f} ms, starting from the file "
        f"{baking.resume_seconds * 1e3:.0f} ms"
    )


def _list(file: Path, bundle: "Bundle") -> Listed:
    from gemma_runtime.snapshot_file import check_maker
    from gemma_runtime.text.baked import read_baked

    try:
        found = read_baked(file)
    except BakedError as error:
        return Listed(str(file), False, str(error), None, None, None)
    try:
        check_maker(file, found.maker, bundle)
        reason = None
    except BakedError as error:
        reason = str(error)
    size = file.stat().st_size
    tokens = len(found.snapshot.tokens)
    return Listed(str(file), reason is None, reason, tokens, size, _begins(found.opening))


def _line(one: Listed) -> str:
    from gemma_runtime.machine import format_bytes

    if one.reason is not None:
        return f"no: {one.reason}"
    size = format_bytes(one.bytes or 0)
    return f"yes: {one.file}: {one.tokens} tokens, {size}, {one.begins}…"


def _begins(opening: "Opening") -> str:
    """The first characters of an opening."""
    texts = [opening.text, opening.system, *(turn.content for turn in opening.examples)]
    names = [tool["function"]["name"] for tool in opening.tools]
    words = " ".join([*filter(None, texts), *(f"[{name}]" for name in names)]).split()
    return " ".join(words)[:_SHOWN]
