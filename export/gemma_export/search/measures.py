"""What a search compares bundles by.

A new measure is a field of Figures and an entry in MEASURES; to limit it, also one of
`schema.Limits`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from gemma_runtime.report.wording import nats, number, percent, size


class Stage(StrEnum):
    """What is done for a cell, in this order."""

    EXPORT = "export"
    VERIFY = "verify"
    EVAL = "eval"
    TASKS = "tasks"
    BENCH = "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A bundle's figures; None for what was not measured."""

    bits_per_weight: float
    size: int  # bytes of the artifact
    weights_kl: float  # nats: quantized against float32 weights, on the goldens
    verdict: str | None = None  # of verify
    kl: float | None = None  # nats per token, from the float32 model, through the artifact
    top1: float | None = None
    worst_language: str | None = None
    worst_kl: float | None = None
    score: float | None = None  # the tasks' mean
    decode: float | None = None  # tokens per second
    prefill: float | None = None  # tokens per second, of the longest prompt up to 512 tokens
    first_token: float | None = None  # seconds, of the same prompt
    load: float | None = None  # seconds
    resident: float | None = None  # bytes, peak
    # Share of the processor that other programs used before speed was measured.
    others: float | None = None


@dataclass(frozen=True, slots=True)
class Measure:
    title: str
    stage: Stage
    written: Callable[[float], str]
    is_better_high: bool = False
    scale: float = 1.0  # of a number in the axis's unit
    unit: str = ""  # at the axis

    @property
    def bound(self) -> str:
        """How a limit is said."""
        return "at least" if self.is_better_high else "at most"

    def oriented(self, value: float) -> float:
        """The value, negated if more is better: then the smallest is the best."""
        return -value if self.is_better_high else value


def _rate(value: float) -> str:
    return f"{number(value, '.1f')} tokens/s"


def _seconds(value: float) -> str:
    return f"{number(value, '.3g')} s"


MEASURES: Mapping[str, Measure] = {
    "kl": Measure("KL to float32", Stage.EVAL, nats, unit="nats"),
    "worst_kl": Measure("worst language's KL", Stage.EVAL, nats, unit="nats"),
    "top1": Measure("top-1", Stage.EVAL, percent, is_better_high=True),
    "score": Measure("mean score of tasks", Stage.TASKS, number, is_better_high=True),
    "weights_kl": Measure("KL of the weights alone", Stage.EXPORT, nats, unit="nats"),
    "size": Measure("artifact", Stage.EXPORT, size, scale=1 / 2**20, unit="MiB"),
    "resident": Measure("peak memory", Stage.BENCH, size, scale=1 / 2**20, unit="MiB"),
    "decode": Measure("decoding", Stage.BENCH, _rate, is_better_high=True, unit="tokens/s"),
    "prefill": Measure("prefill", Stage.BENCH, _rate, is_better_high=True, unit="tokens/s"),
    "first_token": Measure("first token", Stage.BENCH, _seconds, unit="s"),
    "load": Measure("loading", Stage.BENCH, _seconds, unit="s"),
}


def value_of(figures: Figures, name: str) -> float | None:
    value: float | None = getattr(figures, name)
    return value


def shown(name: str, value: float | None) -> str:
    """A value as table, page and messages write it."""
    return number(None) if value is None else MEASURES[name].written(value)


def figure(name: str, figures: Figures) -> str:
    """A figure as tables and messages write it, the worst KL with its language."""
    text = shown(name, value_of(figures, name))
    language = figures.worst_language if name == "worst_kl" else None
    return text if language is None else f"{text} ({language})"


def told(name: str, figures: Figures) -> str:
    """A figure with its measure's title, such as `decoding 20.0 tokens/s`."""
    return f"{MEASURES[name].title} {figure(name, figures)}"
