"""Drafts: the same tokens as without them, in fewer steps, and never many more."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_runtime.session import FakeSession, Logits, open_session
from gemma_runtime.text.draft import PromptLookup
from gemma_runtime.text.generate import generate
from gemma_runtime.text.sampler import Sampling
from tests.data.session_vectors import VECTORS, vectors
from tests.runtime.real_bundles import export_random

VOCABULARY = 24
STOP = 1


def _logits(tokens: Sequence[int]) -> Logits:
    """Any function of the last two tokens, with repetitions: most tokens follow in a cycle."""
    draw = np.random.default_rng(tokens[-2:] if len(tokens) > 1 else tokens)
    logits = draw.normal(size=VOCABULARY).astype(np.float32)
    logits[(tokens[-1] * 5 + 3) % VOCABULARY] += 3
    return logits


class Counting(FakeSession):
    """Counts calls of the model by the number of tokens in them."""

    def __init__(
        self,
        context_length: int = 4096,
        slack: int | None = None,
        script: Callable[[Sequence[int]], Logits] = _logits,
    ) -> None:
        super().__init__(script, context_length, slack)
        self.calls: list[int] = []

    def score(self, tokens: Sequence[int]) -> Logits:
        self.calls.append(len(tokens))
        return super().score(tokens)


SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    top_p=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 5),
)


@given(
    prompt=st.lists(st.integers(2, VOCABULARY - 1), min_size=1, max_size=30),
    new=st.integers(1, 60),
    sampling=SAMPLINGS,
    slack=st.sampled_from([None, 0, 2, 5]),
    context=st.integers(31, 100),
    stops=st.sets(st.integers(0, VOCABULARY - 1), max_size=2),
)
def test_tokens_and_caches_are_those_without_drafts(
    prompt: list[int],
    new: int,
    sampling: Sampling,
    slack: int | None,
    context: int,
    stops: set[int],
) -> None:
    plain, drafting = Counting(context), Counting(context, slack)
    settings = {"max_new_tokens": new, "sampling": sampling, "stop_tokens": stops}
    expected = list(generate(plain, prompt, **settings))  # type: ignore[arg-type]
    drafter = PromptLookup()
    assert list(generate(drafting, prompt, **settings, drafter=drafter)) == expected  # type: ignore[arg-type]
    assert drafting.tokens == plain.tokens
    assert len(drafting.calls) <= len(plain.calls)


def test_a_text_that_repeats_takes_fewer_steps() -> None:
    passage = [2, 9, 4, 17, 3, 8, 21, 6, 11, 5]
    follows = dict(zip(passage, [*passage[1:], passage[0]], strict=True))
    session = Counting(script=lambda t: np.eye(VOCABULARY, dtype=np.float32)[follows[t[-1]]])
    tokens = list(generate(session, passage, max_new_tokens=100, drafter=PromptLookup()))
    assert tokens == passage * 10
    assert len(session.calls) < 20


def test_wrong_guesses_cost_at_most_3_percent_of_the_steps() -> None:
    """Every passage has been seen before, and never goes on as it did: the worst case."""
    drafter, drafted, steps = PromptLookup(), 0, 2000
    draw = np.random.default_rng(0)
    tokens = [2, 3] * 20
    for _ in range(steps):
        guess = drafter.draft(tokens, 15)
        drafter.judge(len(guess), 0)
        drafted += len(guess)
        tokens += [2, 3] if draw.random() < 0.9 else [int(draw.integers(4, 9))]
    assert 0 < 0.3 * drafted <= 0.03 * steps + 0.9


def test_guesses_continue_the_last_time_that_a_passage_occurred() -> None:
    drafter = PromptLookup()
    assert drafter.draft([5, 6, 7, 5, 6, 8, 9, 5, 6], 3) == [8, 9, 5]
    assert PromptLookup().draft([5, 6, 5, 6], 3) == [5, 6, 5]  # into itself
    assert PromptLookup().draft([5, 6, 7], 3) == []
    assert PromptLookup().draft([5, 6, 5, 6], 0) == []


def test_the_phones_are_tested_with_what_this_code_does() -> None:
    assert json.loads(VECTORS.read_text("utf-8")) == json.loads(json.dumps(vectors()))


@pytest.mark.parametrize(("recipe", "exact"), [("none", False), ("int4", True), ("int4", False)])
def test_a_real_bundle_goes_past_its_window_with_drafts(
    tokenizer_path: Path, tmp_path: Path, recipe: str, exact: bool
) -> None:
    """With float activations, one row is computed as several are."""
    bundle = export_random(tmp_path / "b", tokenizer_path, context_length=128, recipe=recipe)
    prompt = [2, *[10, 11, 12, 13, 14, 15] * 4]
    with open_session(bundle, threads=1, exact=exact) as session:
        expected = list(generate(session, prompt, max_new_tokens=90))
        session.reset()
        drafted = list(generate(session, prompt, max_new_tokens=90, drafter=PromptLookup()))
        assert session.tokens == [*prompt, *drafted][:-1]
    if exact or recipe == "none":
        assert drafted == expected
