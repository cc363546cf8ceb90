"""`gemma-runtime`: run, check, measure and inspect bundles. Prints; the library does not."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from gemma_runtime import evaluation_commands, report_command
from gemma_runtime.command import print_json, print_shown, run_app
from gemma_runtime.options import (
    BundlePath,
    BundlePaths,
    Choices,
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
    Threads,
    Tools,
    TopK,
    TopP,
    read_constraint,
)
from gemma_runtime.talk import (
    encode_prompt,
    open_guard,
    print_reply,
    read_stdin,
    send_line,
    stream,
    typed_lines,
)

_HELP = """Run, check and measure the bundles that gemma-export writes. Needs no torch.

[bold]Examples[/bold]

  gemma-runtime run out/gemma --chat "Why is the sky blue?"

  gemma-runtime run out/gemma - --temperature 0.8 < story.txt

  gemma-runtime chat out/gemma --system "Answer in one sentence."

  gemma-runtime verify out/gemma

  gemma-runtime eval out/gemma --text story.txt

  gemma-runtime safety out/float out/gemma --prompts harmful.txt   (before and after)

  gemma-runtime chat out/gemma --guard out/shieldgemma

  gemma-runtime run hub:owner/gemma "Hello"   (downloads the bundle once)

  gemma-runtime bench out/a out/b      (in turns; ratios to the first)

  gemma-runtime inspect out/a out/b    (do they hold the same codes?)

  gemma-runtime report out/a out/b --from figures/ -o report.html   (one page of all figures)

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
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: Grammar = None,
    choice: Choices = [],  # noqa: B006
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Continue a prompt, token by token; greedily unless options say otherwise.

    --json-schema, --regex, --grammar and --choice guarantee the text's format, unless a limit cuts
    it: --json then has complete: false. Describe the format in the prompt too.
    """
    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.session import open_session
    from gemma_runtime.text.constraint import start_constraint
    from gemma_runtime.text.generate import generate_text
    from gemma_runtime.text.sampler import Sampling
    from gemma_runtime.text.tokenizer import load_tokenizer

    constraint = read_constraint(json_schema, regex, grammar, choice)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    text = read_stdin() if prompt == "-" else prompt
    opened = open_bundle(bundle)
    tokenizer = load_tokenizer(opened)
    tokens = encode_prompt(opened, tokenizer, text, system, chat)
    matcher = start_constraint(constraint, tokenizer, opened.manifest.stop_tokens)
    with open_session(opened, threads) as session:
        generation = generate_text(
            session,
            tokenizer,
            tokens,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_tokens=opened.manifest.stop_tokens,
            stop_strings=stop,
            constraint=matcher,
        )
        if not json:
            stream(generation)
        else:
            list(generation)
            print_json(generation.result)


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
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: Grammar = None,
    choice: Choices = [],  # noqa: B006
    roll: Roll = False,
    tools: Tools = None,
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

    With --guard, a reply is printed when the guard has checked it. A turn or reply that violates a
    policy is not answered or shown, but named on stderr, and forgotten.
    """
    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.session import open_session
    from gemma_runtime.text.constraint import start_constraint
    from gemma_runtime.text.conversation import Conversation
    from gemma_runtime.text.sampler import Sampling
    from gemma_runtime.text.tokenizer import load_tokenizer
    from gemma_runtime.text.tools import read_tools

    constraint = read_constraint(json_schema, regex, grammar, choice)
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
    start_constraint(constraint, tokenizer, opened.manifest.stop_tokens)  # refuses before any turn
    with (
        open_guard(guard, guard_threshold, threads) as watch,
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
        )
        for line in typed_lines():
            if line == "/new":
                conversation.reset()
            elif line:
                reply = send_line(
                    conversation, watch, line, max_new_tokens, constraint, bool(schemas)
                )
                if reply is not None:
                    print_reply(reply, json, tools=bool(schemas))


@app.command()
def verify(bundle: BundlePath, threads: Threads = None, json: Json = False) -> None:
    """Replay the goldens on this machine and print PASS, FAIL or AMBIGUOUS with all figures.

    The exit code is 0 only for PASS. AMBIGUOUS: all limits hold, but too many positions are near
    ties.
    """
    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.contents.subject import with_subject
    from gemma_runtime.proof.verify import Verdict, render_verification, verify_bundle

    opened = open_bundle(bundle)
    verification = verify_bundle(opened, threads)
    if json:
        print_json(with_subject(opened, verification))
    else:
        print_shown(render_verification(str(bundle), verification))
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
        print_json(benchmark)
    else:
        print_shown(render_benchmark(benchmark))


def _profile(bundles: list[Path], threads: int | None, json: bool) -> None:
    from rich.text import Text

    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.measure.profile import profile_bundle, render_profile

    profiles = {str(path): profile_bundle(open_bundle(path), threads) for path in bundles}
    if json:
        print_json(profiles)
        return
    for path, profile in profiles.items():
        print_shown(Text(path), render_profile(profile))


app.command("eval")(evaluation_commands.evaluate)


@app.command()
def inspect(bundles: BundlePaths, json: Json = False) -> None:
    """Describe bundles; for several, also check whether they hold the same codes."""
    from gemma_runtime.bundle import open_bundle
    from gemma_runtime.contents.inspection import compare_bundles, render_comparison

    comparison = compare_bundles([open_bundle(bundle) for bundle in bundles])
    if json:
        print_json(comparison)
    else:
        print_shown(render_comparison(comparison))


app.command("lm-eval")(evaluation_commands.lm_eval)
app.command()(evaluation_commands.compare)
app.command()(evaluation_commands.safety)
app.command()(report_command.report)


def main() -> None:
    """The console script."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run with the given arguments; returns the exit code."""
    return run_app(app, "gemma-runtime", arguments)
