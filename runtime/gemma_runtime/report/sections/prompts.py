"""The figures of prompts, which bundles and phones have of different lengths."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from gemma_runtime.measure.bench import PromptFigures


class HasPrompts(Protocol):
    @property
    def prompts(self) -> tuple[PromptFigures, ...]: ...


def prompt_lengths(figures: Iterable[HasPrompts]) -> list[int]:
    """All lengths that any of them has, shortest first."""
    return sorted({prompt.tokens for one in figures for prompt in one.prompts})


def prompt_of(prompts: Sequence[PromptFigures], length: int) -> PromptFigures | None:
    return next((prompt for prompt in prompts if prompt.tokens == length), None)
