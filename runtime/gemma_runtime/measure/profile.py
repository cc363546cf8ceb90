"""Where the time of a prompt and of a new token goes, operator by operator.

The runtimes' own profilers give the figures: onnxruntime's trace, executorch's ETDump. Profiling
slows the work down, so shares are what counts; `bench` gives the times.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from gemma_runtime.backends import BACKENDS, load_function
from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import SessionError
from gemma_runtime.machine import check_threads
from gemma_runtime.measure.bench_worker import random_tokens

_PROMPT, _NEW_TOKENS = 128, 16

# One call of the graph: operators and the seconds each took, as often as it ran.
Call = Sequence[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class OperatorTime:
    operator: str
    calls: float  # per prompt or new token
    milliseconds: float  # of all its calls together
    share: float  # of the time in all operators


@dataclass(frozen=True, slots=True)
class Profile:
    prompt_tokens: int
    prompt: tuple[OperatorTime, ...]  # longest first
    new_token: tuple[OperatorTime, ...]  # mean over several


def profile_bundle(bundle: Bundle, threads: int | None = None) -> Profile:
    """Profile a prompt, after one that warms up, and new tokens.

    Raises SessionError for a target whose runtime has no profiler.
    """
    check_threads(threads)
    target = bundle.manifest.target.name
    profilers = {name: own.profiler for name, own in BACKENDS.items() if own.profiler}
    if target not in profilers:
        raise SessionError(f"no profiler for target {target!r}; there are: {', '.join(profilers)}")
    run: Callable[[Bundle, int | None, Sequence[Sequence[int]]], list[Call]]
    run = load_function(profilers[target])
    manifest = bundle.manifest
    room = min(manifest.prefill_length, manifest.context_length - _NEW_TOKENS, _PROMPT)
    prompt = random_tokens(manifest.vocab_size, max(1, room))
    calls = run(bundle, threads, [prompt, prompt, *([token] for token in prompt[:_NEW_TOKENS])])
    return Profile(len(prompt), _sum_up(calls[1:2]), _sum_up(calls[2:]))


def render_profile(profile: Profile, rows: int = 12) -> Table:
    """The operators that take most of a new token, beside their part in a prompt."""
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
        for operator, took in call:
            seconds[operator] += took
            counts[operator] += 1
    whole = sum(seconds.values()) or 1.0
    return tuple(
        OperatorTime(name, counts[name] / len(calls), took * 1e3 / len(calls), took / whole)
        for name, took in sorted(seconds.items(), key=lambda item: -item[1])
    )
