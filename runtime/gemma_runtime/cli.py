"""`gemma-runtime`: run, check, measure and inspect bundles. Prints; the library does not."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_runtime import evaluation_commands
from gemma_runtime.command import run_app
from gemma_runtime.errors import SessionError, TokenizerError

if TYPE_CHECKING:  # commands import what they need, so --help starts fast
    from rich.console import RenderableType

    from gemma_runtime.bundle import Bundle
    from gemma_runtime.text.generate import Conversation, Generation, TextGeneration
    from gemma_runtime.text.tokenizer import Tokenizer

_RESULTS = "/results"
_HELP = """Run, check and measure the bundles that gemma-export writes. Needs no torch.

[bold]Examples[/bold]

  gemma-runtime run out/gemma --chat "Why is the sky blue?"

  gemma-runtime run out/gemma - --temperature 0.8 < story.txt

  gemma-runtime chat out/gemma --system "Answer in one sentence."

  gemma-runtime verify out/gemma

  gemma-runtime eval out/gemma --text story.txt

  gemma-runtime run hub:owner/gemma "Hello"   (downloads the bundle once)

  gemma-runtime bench out/a out/b      (in turns; ratios to the first)

  gemma-runtime inspect out/a out/b    (do they hold the same codes?)

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


def _check_threads(threads: int | None) -> int | None:
    """Refuse too many threads before the bundle is read."""
    if threads is not None:
        from gemma_runtime.machine import check_threads

        check_threads(threads)
    return threads


def _bundle_folder(text: str) -> Path:
    """The folder of a bundle; one given as `hub:OWNER/NAME` is downloaded first."""
    from gemma_runtime.hub import HUB_PREFIX, fetch_bundle

    is_on_hub = text.startswith(HUB_PREFIX)
    return fetch_bundle(text.removeprefix(HUB_PREFIX)) if is_on_hub else Path(text)


BundlePath = Annotated[
    Path,
    typer.Argument(
        metavar="BUNDLE",
        parser=_bundle_folder,
        help="The bundle's folder, or hub:OWNER/NAME\\[@REVISION].",
    ),
]
BundlePaths = Annotated[
    list[Path],
    typer.Argument(
        metavar="BUNDLE",
        parser=_bundle_folder,
        help="One or more bundles: folders, or hub:OWNER/NAME\\[@REVISION].",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, callback=_check_threads, help="Number of threads. \\[physical cores]"),
]
Json = Annotated[bool, typer.Option("--json", help="Figures as JSON on stdout.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
Temperature = Annotated[
    float, typer.Option(help="Sampling temperature; 0 always takes the likeliest token.")
]
TopK = Annotated[int, typer.Option(help="Sample from the k likeliest tokens; 0 means all.")]
TopP = Annotated[
    float, typer.Option(help="Sample from the likeliest tokens whose probabilities sum to p.")
]
MinP = Annotated[
    float, typer.Option(help="Drop tokens less likely than this share of the likeliest.")
]
Penalty = Annotated[float, typer.Option(help="Above 1, repeated tokens become less likely.")]
OwnTemperature = Annotated[
    float | None,
    typer.Option(help="Sampling temperature; 0 always takes the likeliest token. \\[the bundle's]"),
]
OwnTopK = Annotated[
    int | None,
    typer.Option(help="Sample from the k likeliest tokens; 0 means all. \\[the bundle's]"),
]
OwnTopP = Annotated[
    float | None,
    typer.Option(
        help="Sample from the likeliest tokens whose probabilities sum to p. \\[the bundle's]"
    ),
]
OwnMinP = Annotated[
    float | None,
    typer.Option(help="Drop tokens less likely than this share of the likeliest. \\[the bundle's]"),
]
OwnPenalty = Annotated[
    float | None,
    typer.Option(help="Above 1, repeated tokens become less likely. \\[the bundle's]"),
]
Tools = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Tools that the model can call: a JSON list of schemas."),
]
Roll = Annotated[
    bool,
    typer.Option("--roll", help="When the context is full, forget the oldest turns and go on."),
]
Seed = Annotated[
    int | None, typer.Option(help="Seed for sampling; the same seed gives the same text.")
]
Stops = Annotated[list[str], typer.Option(help="Stop before this text. Can be repeated.")]
System = Annotated[
    str | None, typer.Option(help="System prompt: instructions before the first turn.")
]


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


@app.command()
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
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Stops = [],  # noqa: B006  (typer only reads the default)
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Continue a prompt, token by token; greedily unless options say otherwise."""
    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.session import open_session
    from gemma_runtime.text.generate import generate_text
    from gemma_runtime.text.sampler import Sampling
    from gemma_runtime.text.tokenizer import load_tokenizer

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    text = _read_stdin() if prompt == "-" else prompt
    opened = open_bundle(bundle)
    tokenizer = load_tokenizer(opened)
    tokens = _encode(opened, tokenizer, text, system, chat)
    with open_session(opened, threads) as session:
        generation = generate_text(
            session,
            tokenizer,
            tokens,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_tokens=opened.manifest.stop_tokens,
            stop_strings=stop,
        )
        if not json:
            _stream(generation)
        else:
            list(generation)
            _print_json(generation.result)


@app.command()
def chat(
    bundle: BundlePath,
    system: System = None,
    max_new_tokens: NewTokens = 512,
    temperature: OwnTemperature = None,
    top_k: OwnTopK = None,
    top_p: OwnTopP = None,
    min_p: OwnMinP = None,
    repetition_penalty: OwnPenalty = None,
    seed: Seed = None,
    stop: Stops = [],  # noqa: B006  (typer only reads the default)
    roll: Roll = False,
    tools: Tools = None,
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
    """
    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.session import open_session
    from gemma_runtime.text.generate import Conversation
    from gemma_runtime.text.sampler import Sampling
    from gemma_runtime.text.tokenizer import load_tokenizer
    from gemma_runtime.text.tools import read_tools

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
    with open_session(opened, threads) as session:
        conversation = Conversation(
            session,
            load_tokenizer(opened),
            template=opened.manifest.chat_template,
            bos_token=opened.manifest.bos_token,
            eos_token=opened.manifest.eos_token,
            stop_tokens=opened.manifest.stop_tokens,
            stop_strings=stop,
            sampling=sampling,
            system=system,
            roll=roll,
            tools=schemas,
        )
        for line in _lines():
            if line == "/new":
                conversation.reset()
            elif line:
                _reply(conversation, line, max_new_tokens, json, tools=bool(schemas))


@app.command()
def verify(bundle: BundlePath, threads: Threads = None, json: Json = False) -> None:
    """Replay the goldens on this machine and print PASS, FAIL or AMBIGUOUS with all figures.

    The exit code is 0 only for PASS. AMBIGUOUS: all limits hold, but too many positions are near
    ties.
    """
    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.proof.verify import Verdict, render_verification, verify_bundle

    verification = verify_bundle(open_bundle(bundle), threads)
    if json:
        _print_json(verification)
    else:
        _print(render_verification(str(bundle), verification))
    if verification.verdict is not Verdict.PASS:
        raise typer.Exit(1)


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
    json: Json = False,
) -> None:
    """Measure loading, first token, decoding and memory; several bundles take turns.

    Use an idle machine: on a busy one times are too long, and a warning says so.
    """
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text

    from gemma_runtime.measure.bench import measure
    from gemma_runtime.measure.bench_table import render_benchmark

    if profile:
        _profile(bundles, threads, json)
        return
    with Status("", console=Console(stderr=True)) as status:
        benchmark = measure(
            bundles,
            threads=threads,
            repeats=repeats,
            new_tokens=new_tokens,
            on_progress=lambda text: status.update(
                Text(text)
            ),  # a folder's name may look like markup
        )
    if json:
        _print_json(benchmark)
    else:
        _print(render_benchmark(benchmark))


def _profile(bundles: list[Path], threads: int | None, json: bool) -> None:
    from rich.text import Text

    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.measure.profile import profile_bundle, render_profile

    profiles = {str(path): profile_bundle(open_bundle(path), threads) for path in bundles}
    if json:
        _print_json(profiles)
        return
    for path, profile in profiles.items():
        _print(Text(path), render_profile(profile))


@app.command("eval")
def evaluate(
    bundle: BundlePath,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A file, cut into segments at blank lines, or a folder of files. "
            "\\[the text given to --eval-text at export]"
        ),
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Perplexity of a text, and KL and top-1 to the float32 model, per segment.

    KL and top-1 need a bundle exported with --eval-text; without it only perplexity is reported.
    """
    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.proof.evaluate import evaluate_bundle, render_evaluation
    from gemma_runtime.proof.teacher import read_segments

    texts = read_segments(text) if text else None
    evaluation = evaluate_bundle(open_bundle(bundle), texts, threads)
    if json:
        _print_json(evaluation)
    else:
        _print(render_evaluation(str(bundle), evaluation))


@app.command()
def inspect(bundles: BundlePaths, json: Json = False) -> None:
    """Describe bundles; for several, also check whether they hold the same codes."""
    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.contents.inspection import compare_bundles, render_comparison

    comparison = compare_bundles([open_bundle(bundle) for bundle in bundles])
    if json:
        _print_json(comparison)
    else:
        _print(render_comparison(comparison))


app.command("lm-eval")(evaluation_commands.lm_eval)
app.command()(evaluation_commands.compare)


def main() -> None:
    """The console script."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run with the given arguments; returns the exit code."""
    return run_app(app, "gemma-runtime", arguments)


def _read_stdin() -> str:
    """Standard input as UTF-8, whatever the locale is."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"byte {error.start} of stdin is not UTF-8; convert the text, e.g. with iconv"
        ) from error


def _encode(
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


def _reply(
    conversation: "Conversation", line: str, max_new_tokens: int, json: bool, tools: bool
) -> None:
    before = conversation.forgotten
    try:
        if tools and line.startswith(_RESULTS):
            reply = conversation.send_results(_results(line), max_new_tokens)
        else:
            reply = conversation.send(line, max_new_tokens)
    except (SessionError, TokenizerError) as error:
        if not sys.stdin.isatty():
            raise
        print(f"error: {error}", file=sys.stderr)  # a person can shorten the turn, or type /new
        return
    if forgotten := conversation.forgotten - before:
        print(f"[the context is full: forgot the oldest {forgotten} turns]", file=sys.stderr)
    if json:
        list(reply)
        _print_json(reply.result)
    elif tools:
        _print_whole(reply)
    else:
        _stream(reply)


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


def _print_whole(generation: "TextGeneration") -> None:
    """Print a reply when it is finished, because only then calls are told from text."""
    import msgspec

    list(generation)
    result = generation.result
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
    return (
        f"[{result.prompt_tokens} prompt tokens, first token after "
        f"{result.first_token_seconds * 1e3:.0f} ms; {result.new_tokens} new, {rate}; "
        f"ended by {result.reason.value.replace('_', ' ')}]"
    )


def _lines() -> Iterable[str]:
    """Lines that the user types, until /quit or the end of input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        yield line


def _print(*shown: "RenderableType") -> None:
    from rich.console import Console

    Console().print(*shown, sep="\n")


def _print_json(value: object) -> None:
    import msgspec

    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()
