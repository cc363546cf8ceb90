"""Profiles a prompt and new tokens: the time in each operator.

Uses the runtimes' own profilers: onnxruntime's trace, executorch's ETDump. Profiling slows the work
down, so only the shares are meaningful. Use `bench` for times.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from gemma_runtime.backend_table import BACKENDS, load_function
from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import SessionError
from gemma_runtime.machine import check_threads
from gemma_runtime.measure.bench_worker import random_tokens

_PROMPT, _NEW_TOKENS = 128, 16

# One call of the graph: (operator, seconds) for every operator that ran, in order.
Call = Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class OperatorTime:
    operator: str
    calls: float  # per prompt or new token
    milliseconds: float  # per prompt or new token, of all its calls
    share: float  # of the time of all operators


@dataclass(frozen=True, slots=True)
class Profile:
    prompt_tokens: int
    prompt: tuple[OperatorTime, ...]  # longest first
    new_token: tuple[OperatorTime, ...]  # means over several new tokens, longest first


def profile_bundle(bundle: Bundle, threads: int | None = None) -> Profile:
    """Profile a prompt, after a warm-up prompt, and then new tokens.

    Raises SessionError if the target's runtime has no profiler.
    """
    check_threads(threads)
    target = bundle.manifest.target.name
    profilers = {name: own.profiler for name, own in BACKENDS.items() if own.profiler}
    if target not in profilers:
        known = ", ".join(profilers)
        raise SessionError(f"target {target!r} has no profiler; these targets have one: {known}")
    run: Callable[[Bundle, int | None, Sequence[Sequence[int]]], list[Call]]
    run = load_function(profilers[target])
    manifest = bundle.manifest
    length = min(manifest.prefill_length, manifest.context_length - _NEW_TOKENS, _PROMPT)
    prompt = random_tokens(manifest.vocab_size, max(1, length))
    calls = run(bundle, threads, [prompt, prompt, *([token] for token in prompt[:_NEW_TOKENS])])
    return Profile(len(prompt), _sum_up(calls[1:2]), _sum_up(calls[2:]))


def render_profile(profile: Profile, rows: int = 12) -> Table:
    """The slowest operators of a new token, with their times in a prompt."""
    table = Table(title=f"operators, {profile.prompt_tokens} prompt tokens and one new token")
    for heading in ("operator", "calls", "new token", "", "prompt", ""):
        table.add_column(heading, justify="left" if heading == "operator" else "right")
    prompt = {time.operator: time for time in profile.prompt}
    for time in profile.new_token[:rows]:
        other = prompt.get(time.operator)
        cells = (f"{other.milliseconds:.2f} ms", f"{other.share:.0%}") if other else ("", "")
        new = (f"{time.milliseconds:.2f} ms", f"{time.share:.0%}")
        table.add_row(time.operator, f"{time.calls:g}", *new, *cells)
    return table


def _sum_up(calls: Sequence[Call]) -> tuple[OperatorTime, ...]:
    seconds: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for call in calls:
        for operator, duration in call:
            seconds[operator] += duration
            counts[operator] += 1
    total = sum(seconds.values()) or 1.0
    return tuple(
        OperatorTime(name, counts[name] / len(calls), spent * 1e3 / len(calls), spent / total)
        for name, spent in sorted(seconds.items(), key=lambda item: -item[1])
    )
