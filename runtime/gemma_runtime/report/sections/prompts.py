"""Rows on prompts and the tokens after them, which bundles and phones have of different lengths."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from gemma_runtime.measure.bench import HasPrompts, Spread, prompt_lengths, prompt_of
from gemma_runtime.report.wording import ABSENT, milliseconds, number

T = TypeVar("T")
Written = Callable[[float], str]
Cells = tuple[str, ...]


class Speed(HasPrompts, Protocol):
    @property
    def decode_tokens_per_second(self) -> Spread: ...
    @property
    def token_p95_ms(self) -> Spread: ...


def prompt_rows(
    speeds: Sequence[Speed | None], shown: Callable[[Spread, Written], str]
) -> Iterator[tuple[str, Cells]]:
    """Labels, and a cell for each speed; None was not measured. `shown` writes a spread."""

    def row(
        found: Sequence[T | None], get: Callable[[T], Spread | None], written: Written
    ) -> Cells:
        spreads = [None if one is None else get(one) for one in found]
        return tuple(ABSENT if one is None else shown(one, written) for one in spreads)

    lengths = prompt_lengths(one for one in speeds if one is not None)
    prompts = {n: [None if s is None else prompt_of(s, n) for s in speeds] for n in lengths}
    for length, found in prompts.items():
        firsts = row(found, lambda prompt: prompt.first_token_ms, milliseconds)
        yield f"first token, prompt of {length}", firsts
        yield f"prefill of {length}, tokens/s", row(found, lambda p: p.tokens_per_second, rate)
    yield "decoding, tokens/s", row(speeds, lambda speed: speed.decode_tokens_per_second, rate)
    for length, found in prompts.items():
        after = row(found, lambda prompt: prompt.decode_tokens_per_second, rate)
        if set(after) != {ABSENT}:
            yield f"  after {length} tokens", after
    yield "new token, p95", row(speeds, lambda speed: speed.token_p95_ms, milliseconds)


def rate(value: float) -> str:
    return number(value, ".1f")
