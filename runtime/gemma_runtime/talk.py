"""What `run` and `chat` read and print: prompts, turns, replies and their speed."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from gemma_runtime.command import print_json
from gemma_runtime.errors import SessionError, TokenizerError

if TYPE_CHECKING:  # imported when needed, so --help starts fast
    from gemma_runtime.bundle import Bundle
    from gemma_runtime.text.constraint import Constraint
    from gemma_runtime.text.conversation import Conversation
    from gemma_runtime.text.draft import PromptLookup
    from gemma_runtime.text.generate import Generation, TextGeneration
    from gemma_runtime.text.guard import Guard
    from gemma_runtime.text.guarded import Withheld
    from gemma_runtime.text.tokenizer import Tokenizer

_RESULTS = "/results"


@contextmanager
def open_guard(
    folder: Path | None, threshold: float | None, threads: int | None
) -> Iterator["Guard | None"]:
    """The guard of `--guard`; None without one."""
    if folder is None:
        if threshold is not None:
            raise typer.BadParameter("goes with --guard", param_hint="--guard-threshold")
        yield None
        return
    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.text.guard import Guard

    with Guard(
        open_bundle(folder), threshold=0.5 if threshold is None else threshold, threads=threads
    ) as guard:
        yield guard


def start_drafter(bundle: "Bundle", draft: bool) -> "PromptLookup | None":
    """The drafter of `--draft`. Raises SessionError if the bundle's runtime can't use one."""
    from gemma_runtime.backend_table import BACKENDS
    from gemma_runtime.text.draft import PromptLookup

    name = bundle.manifest.target.name
    if not draft:
        return None
    if name in BACKENDS and not BACKENDS[name].scores_together:
        raise SessionError(
            f"{name} bundles compute the logits of one token per call, so drafts save no time; "
            "leave --draft out"
        )
    return PromptLookup()


def read_stdin() -> str:
    """Standard input as UTF-8, whatever the locale is."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"byte {error.start} of stdin is not UTF-8; convert the text, e.g. with iconv"
        ) from error


def encode_prompt(
    bundle: "Bundle", tokenizer: "Tokenizer", text: str, system: str | None, chat: bool
) -> list[int]:
    from gemma_runtime.text.chat import Message, encode_chat

    manifest = bundle.manifest
    if not chat:
        if system is not None:
            raise typer.BadParameter("goes with --chat", param_hint="--system")
        return [manifest.bos_token, *tokenizer.encode(text)]
    messages = [Message("user", text)]
    if system is not None:
        messages.insert(0, Message("system", system))
    return encode_chat(
        tokenizer, manifest.chat_template, messages, manifest.bos_token, manifest.eos_token
    )


def send_line(
    conversation: "Conversation",
    guard: "Guard | None",
    line: str,
    max_new_tokens: int,
    constraint: "Constraint | None",
    tools: bool,
) -> "TextGeneration | Generation | Withheld | None":
    """The reply to a typed line, whole if a guard checks it.

    None if the line was refused and the user can type another.
    """
    from gemma_runtime.text.guarded import GuardedConversation

    sender = conversation if guard is None else GuardedConversation(conversation, guard)
    before = conversation.forgotten
    reply: TextGeneration | Generation | Withheld
    try:
        if tools and line.startswith(_RESULTS):
            reply = sender.send_results(_results(line), max_new_tokens, constraint)
        else:
            reply = sender.send(line, max_new_tokens, constraint)
    except (SessionError, TokenizerError) as error:
        if not sys.stdin.isatty():
            raise
        print(f"error: {error}", file=sys.stderr)  # a person can shorten the turn, or type /new
        return None
    if forgotten := conversation.forgotten - before:
        print(f"[the context is full: forgot the oldest {forgotten} turns]", file=sys.stderr)
    return reply


def print_reply(reply: "TextGeneration | Generation | Withheld", json: bool, tools: bool) -> None:
    from gemma_runtime.text.generate import TextGeneration
    from gemma_runtime.text.guarded import Withheld

    if isinstance(reply, TextGeneration):
        if not json and not tools:
            stream(reply)
            return
        list(reply)
        reply = reply.result
    if json:
        print_json(reply)
    elif isinstance(reply, Withheld):
        named = ", ".join(f"{name} {score:.2f}" for name, score in reply.policies.items())
        print(f"[the guard stopped this {reply.withheld}: {named}]", file=sys.stderr)
    else:
        _print_whole(reply)


def _results(line: str) -> list[object]:
    """What the called tools returned, from a line that begins with /results."""
    import json

    try:
        results = json.loads(line.removeprefix(_RESULTS))
    except ValueError as error:
        raise TokenizerError(f"{_RESULTS} is not followed by JSON: {error}") from error
    if not isinstance(results, list):
        raise TokenizerError(f"{_RESULTS} expects a JSON list with one result for each call")
    return results


def _print_whole(result: "Generation") -> None:
    """Print a finished reply with its calls, which only then are told from text."""
    import msgspec

    if result.text or not result.tool_calls:
        print(result.text)
    if result.tool_calls:
        print(msgspec.json.encode(result.tool_calls).decode())
    print(_speed(result), file=sys.stderr)


def stream(generation: "TextGeneration") -> None:
    for piece in generation:
        print(piece, end="", flush=True)
    print()
    print(_speed(generation.result), file=sys.stderr)


def _speed(result: "Generation") -> str:
    decoding = result.seconds - result.first_token_seconds
    rate = f"{(result.new_tokens - 1) / decoding:.1f} tokens/s" if decoding > 0 else "no rate"
    if 0 < result.steps < result.new_tokens - 1:
        rate += f" ({(result.new_tokens - 1) / result.steps:.1f} a step)"
    return (
        f"[{result.prompt_tokens} prompt tokens, first token after "
        f"{result.first_token_seconds * 1e3:.0f} ms; {result.new_tokens} new, {rate}; "
        f"ended by {result.reason.value.replace('_', ' ')}]"
    )


def typed_lines() -> Iterable[str]:
    """Lines that the user types, until /quit or the end of input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        yield line
