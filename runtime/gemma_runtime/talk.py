"""The commands `run` and `chat`: prompts, turns, replies and their speed."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_runtime.command import print_json
from gemma_runtime.errors import SessionError, TokenizerError
from gemma_runtime.options import (
    BakedPath,
    BundlePath,
    Choices,
    Draft,
    Grammar,
    GuardPath,
    GuardThreshold,
    Json,
    JsonSchema,
    MinP,
    NewTokens,
    OwnMinP,
    OwnPenalty,
    OwnTemperature,
    OwnTopK,
    OwnTopP,
    Penalty,
    Regex,
    Roll,
    Seed,
    Stops,
    System,
    Temperature,
    Think,
    Threads,
    Tools,
    TopK,
    TopP,
    Translate,
    choose_opening,
    open_prefix,
    read_constraint,
)

if TYPE_CHECKING:  # imported when needed, so --help starts fast
    from gemma_runtime.bundle import Bundle
    from gemma_runtime.text.constraint import Constraint
    from gemma_runtime.text.conversation import Conversation
    from gemma_runtime.text.generate import Generation, TextGeneration
    from gemma_runtime.text.guard import Guard
    from gemma_runtime.text.guarded import Withheld

_RESULTS = "/results"


def run(
    bundle: BundlePath,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Send the prompt as a user turn, for instruction-tuned models."
        ),
    ] = False,
    system: System = None,
    think: Think = False,
    translate: Translate = None,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stops = [],  # noqa: B006  (typer only reads the default)
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: Grammar = None,
    choice: Choices = [],  # noqa: B006
    draft: Draft = False,
    baked: BakedPath = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Continue a prompt, token by token; greedily unless options say otherwise.

    --json-schema, --regex, --grammar and --choice guarantee the text's format, unless a limit cuts
    it: --json then has complete: false. Describe the format in the prompt too.

    With --baked, the prompt is what follows the baked text; with --chat, the turn that follows the
    baked system turn.
    """
    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.session import open_session
    from gemma_runtime.text.constraint import start_constraint
    from gemma_runtime.text.draft import PromptLookup
    from gemma_runtime.text.frame import read_languages
    from gemma_runtime.text.generate import generate_text
    from gemma_runtime.text.sampler import Sampling
    from gemma_runtime.text.tokenizer import load_tokenizer
    from gemma_runtime.text.tools import tool_names

    constraint = read_constraint(json_schema, regex, grammar, choice)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    text = _read_stdin() if prompt == "-" else prompt
    opened = open_bundle(bundle)
    tokenizer = load_tokenizer(opened)
    prefix = open_prefix(baked, opened)
    for flag, is_given in (("--think", think), ("--translate", translate)):
        if is_given and not chat:
            raise typer.BadParameter("goes with --chat", param_hint=flag)
    opening = choose_opening(prefix, system, chat)
    languages = None if translate is None else read_languages(translate)
    tokens = opening.encode(tokenizer, opened.manifest, text, think, languages)
    if prefix is not None:
        prefix.check_begins(tokens)
    matcher = start_constraint(constraint, tokenizer, opened.manifest.stop_tokens)
    if draft:
        _check_drafts(opened)
    with open_session(opened, threads) as session:
        if prefix is not None:
            session.resume(prefix.snapshot)
        held = session.position
        generation = generate_text(
            session,
            tokenizer,
            tokens[held:],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_tokens=opened.manifest.stop_tokens,
            stop_strings=stop,
            history=tokens[:held],
            tools=tool_names(opening.tools),
            constraint=matcher,
            drafter=PromptLookup() if draft else None,
            thinking=think,
        )
        if not json:
            _stream(generation)
        else:
            list(generation)
            print_json(generation.result)


def chat(
    bundle: BundlePath,
    system: System = None,
    think: Think = False,
    translate: Translate = None,
    max_new_tokens: NewTokens = 512,
    temperature: OwnTemperature = None,
    top_k: OwnTopK = None,
    top_p: OwnTopP = None,
    min_p: OwnMinP = None,
    repetition_penalty: OwnPenalty = None,
    seed: Seed = None,
    stop: Stops = [],  # noqa: B006  (typer only reads the default)
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: Grammar = None,
    choice: Choices = [],  # noqa: B006
    draft: Draft = False,
    roll: Roll = False,
    tools: Tools = None,
    baked: BakedPath = None,
    guard: GuardPath = None,
    guard_threshold: GuardThreshold = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Chat with an instruction-tuned model, one line per turn. /new starts over, /quit ends.

    Samples as the checkpoint's authors do, if the bundle says how (see inspect), else greedily;
    each option replaces one value. With --json, every reply is one line of JSON. A turn that does
    not fit the context is refused; if turns are piped in, that ends the chat. With --roll, the
    oldest turns are forgotten instead.

    With --tools, a reply that calls tools is printed as JSON. Answer it with /results and a JSON
    list that has one result for each call.

    --json-schema, --regex, --grammar and --choice guarantee the format of every reply, unless a
    limit cuts it.

    With --baked, the system turn, examples and tools are those of the file.

    With --guard, a reply is printed when the guard has checked it. A turn or reply that violates a
    policy is not answered or shown, but named on stderr, and forgotten.
    """
    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.session import open_session
    from gemma_runtime.text.constraint import start_constraint
    from gemma_runtime.text.conversation import Conversation
    from gemma_runtime.text.frame import read_languages
    from gemma_runtime.text.sampler import Sampling
    from gemma_runtime.text.tokenizer import load_tokenizer
    from gemma_runtime.text.tools import read_tools

    constraint = read_constraint(json_schema, regex, grammar, choice)
    languages = None if translate is None else read_languages(translate)
    schemas = read_tools(tools) if tools else []
    opened = open_bundle(bundle)
    sampling = Sampling.by_default(
        opened.manifest.sampling,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    tokenizer = load_tokenizer(opened)
    prefix = open_prefix(baked, opened)
    has_tools = bool(schemas or (prefix and prefix.opening.tools))
    start_constraint(constraint, tokenizer, opened.manifest.stop_tokens)  # refuses before any turn
    if draft:
        _check_drafts(opened)
    with (
        _open_guard(guard, guard_threshold, threads) as watch,
        open_session(opened, threads) as session,
    ):
        conversation = Conversation(
            session,
            tokenizer,
            template=opened.manifest.chat_template,
            bos_token=opened.manifest.bos_token,
            eos_token=opened.manifest.eos_token,
            stop_tokens=opened.manifest.stop_tokens,
            stop_strings=stop,
            sampling=sampling,
            system=system,
            roll=roll,
            tools=schemas,
            drafts=draft,
            baked=prefix,
            thinking=think,
            languages=languages,
        )
        for line in _typed_lines():
            if line == "/new":
                conversation.reset()
            elif line:
                reply = _send_line(conversation, watch, line, max_new_tokens, constraint, has_tools)
                if reply is not None:
                    _print_reply(reply, json, tools=has_tools)


@contextmanager
def _open_guard(
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


def _check_drafts(bundle: "Bundle") -> None:
    """Raise SessionError if drafts save the bundle's runtime no time."""
    from gemma_runtime.backend_table import BACKENDS

    name = bundle.manifest.target.name
    if name in BACKENDS and not BACKENDS[name].scores_together:
        raise SessionError(
            f"{name} bundles compute the logits of one token per call, so drafts save no time; "
            "leave --draft out"
        )


def _read_stdin() -> str:
    """Standard input as UTF-8, whatever the locale is."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"byte {error.start} of stdin is not UTF-8; convert the text, e.g. with iconv"
        ) from error


def _send_line(
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


def _print_reply(reply: "TextGeneration | Generation | Withheld", json: bool, tools: bool) -> None:
    from gemma_runtime.text.generate import TextGeneration
    from gemma_runtime.text.guarded import Withheld

    if isinstance(reply, TextGeneration):
        if not json and not tools:
            _stream(reply)
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
    except (RecursionError, ValueError) as error:
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


def _stream(generation: "TextGeneration") -> None:
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


def _typed_lines() -> Iterable[str]:
    """Lines that the user types, until /quit or the end of input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        yield line
