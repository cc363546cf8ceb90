"""The session is real: the tiny bundle's kernels round other chunks in another way."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from gemma_runtime.bundle import Bundle, open_bundle
from gemma_runtime.errors import EvaluationError
from gemma_runtime.lm_eval.shared import (
    Continuation,
    Likelihood,
    Prompt,
    check_chunk,
    continue_prompts,
    score_continuations,
)
from gemma_runtime.session import FakeSession, Logits, Session, open_session
from gemma_runtime.text.sampler import Sampling
from gemma_runtime.text.tokenizer import load_tokenizer

TINY = Path(__file__).parents[2] / "data" / "tiny"
CHUNK = 8


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle(TINY)


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> Iterator[Session]:
    with open_session(bundle, threads=1) as opened:
        yield opened


def _tokens(count: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(10, 376) for _ in range(count))


def _questions() -> list[Continuation]:
    """Shared beginnings of all lengths, several choices, and choices longer than a chunk."""
    head = (2, *_tokens(22, 0))
    contexts = [
        head[:3],
        head[:8],
        head[:9],
        head,
        *((*head, *_tokens(n, n)) for n in (1, 6, 9, 30)),
    ]
    return [
        Continuation(context, _tokens(length, 100 + length))
        for context in contexts
        for length in (1, 1, 2, 5, 20)
    ]


def _scored(session: Session, asked: Sequence[Continuation], chunk: int) -> list[Likelihood]:
    found = dict(score_continuations(session, asked, chunk))
    return [found[index] for index in range(len(asked))]


def test_likelihoods_are_those_of_the_logits(session: Session) -> None:
    asked = _questions()

    found = _scored(session, asked, CHUNK)

    for question, likelihood in zip(asked, found, strict=True):
        whole = [*question.context, *question.tokens]
        session.reset()
        logits = session.score(whole).astype(np.float64)[len(question.context) - 1 : -1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = log_p[np.arange(len(question.tokens)), question.tokens].sum()
        # The kernels round activations to int8, in other ways for other chunks.
        assert likelihood.log_p == pytest.approx(expected, abs=0.2)


def test_a_greedy_continuation_is_recognized(session: Session) -> None:
    context = (2, *_tokens(12, 1))
    session.reset()
    best = [int(session.prefill(context).argmax())]
    for _ in range(2):
        best.append(int(session.decode(best[-1]).argmax()))
    other = (*best[:2], (best[2] + 1) % 376)

    greedy, not_greedy = _scored(
        session, [Continuation(context, tuple(best)), Continuation(context, other)], CHUNK
    )

    assert greedy.is_greedy
    assert not not_greedy.is_greedy


def test_an_answer_does_not_depend_on_what_else_is_asked(session: Session) -> None:
    """Bit for bit: after an interruption, or with --limit, fewer questions are asked."""
    asked = _questions()
    found = _scored(session, asked, CHUNK)

    alone = [_scored(session, [question], CHUNK)[0] for question in asked]
    some = sorted(random.Random(3).sample(range(len(asked)), 20), key=lambda i: -i)
    again = _scored(session, [asked[i] for i in some], CHUNK)

    assert alone == found
    assert again == [found[i] for i in some]


def test_the_size_of_chunks_changes_the_rounding(session: Session) -> None:
    """Shows that the test above can fail."""
    asked = _questions()

    assert _scored(session, asked, CHUNK) != _scored(session, asked, 2 * CHUNK)


@pytest.mark.parametrize("slack", [0, 5, 1000])
def test_shared_beginnings_are_fed_once(slack: int) -> None:
    """Also if the session goes back to marks only. 40 questions with 64 tokens in common."""
    fed = 0

    def script(tokens: Sequence[int]) -> Logits:
        nonlocal fed
        fed += 1
        return np.zeros(8, np.float32)

    head = (2, *(3 for _ in range(63)))
    asked = [
        Continuation((*head, *(4 + (i >> bit) % 2 for bit in range(6))), (5,) * choice)
        for i in range(40)
        for choice in (1, 2)
    ]

    found = list(score_continuations(FakeSession(script, slack=slack), asked, 32))

    assert len(found) == 80
    assert fed == 64 + 40 * (6 + 1)  # heads once; six own tokens, and one of the second choice


def test_texts_do_not_depend_on_what_else_is_asked(bundle: Bundle, session: Session) -> None:
    tokenizer = load_tokenizer(bundle)
    head = (2, *_tokens(20, 4))
    asked = [
        Prompt(tokens, 6, (), sampling)
        for tokens in (head, head[:8], head[:9], (*head, 50), (*head, 60), (*head, 60))
        for sampling in (Sampling(), Sampling(temperature=1.0, seed=3))
    ]
    stops = bundle.manifest.stop_tokens

    together = dict(continue_prompts(session, tokenizer, asked, stops, CHUNK))

    for index, prompt in enumerate(asked):
        ((_, alone),) = continue_prompts(session, tokenizer, [prompt], stops, CHUNK)
        assert together[index] == alone
    assert len(set(together.values())) > 4


def test_a_text_ends_before_a_stop_string(bundle: Bundle, session: Session) -> None:
    tokenizer = load_tokenizer(bundle)
    prompt = Prompt((2, *_tokens(9, 5)), 12, (), Sampling())
    ((_, text),) = continue_prompts(session, tokenizer, [prompt], (), CHUNK)
    stop = text[3:5]

    stopped = Prompt(prompt.tokens, 12, (stop,), Sampling())
    ((_, cut),) = continue_prompts(session, tokenizer, [stopped], (), CHUNK)

    assert cut == text[: text.index(stop)]


@pytest.mark.parametrize("chunk", [0, 1, 7, 66])
def test_chunks_are_even_and_small(chunk: int) -> None:
    with pytest.raises(EvaluationError, match="expected an even number from 2 to 64"):
        check_chunk(chunk)
