"""Scores and continues many prompts, feeding what neighbours share once.

Quantized kernels round another chunking of the same tokens differently, by as much as quantization
itself changes their logits. So each prompt is cut at the same positions whatever else is asked, and
a cached chunk is used again only if it was cut so too. An answer is then a function of its prompt
alone. T new tokens, V vocabulary.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby, pairwise

from gemma_runtime.errors import EvaluationError
from gemma_runtime.marks import Mark
from gemma_runtime.proof.goldens import log_sum_exp
from gemma_runtime.session import Logits, Session
from gemma_runtime.text.generate import generate_text
from gemma_runtime.text.sampler import Sampling
from gemma_runtime.text.tokenizer import Tokenizer

LARGEST_CHUNK = 64  # above it onnxruntime's int8 kernels round in another way
_MARKS = 4  # at most so many copies of a session's caches
Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Continuation:
    context: Tokens  # at least one token
    tokens: Tokens  # at least one


@dataclass(frozen=True, slots=True)
class Likelihood:
    log_p: float  # nats, of all tokens of the continuation
    is_greedy: bool  # whether each token is the likeliest


@dataclass(frozen=True, slots=True)
class Prompt:
    tokens: Tokens
    max_new_tokens: int
    stop_strings: tuple[str, ...]
    sampling: Sampling


def check_chunk(chunk: int) -> int:
    """Raise EvaluationError unless the chunk is even and small, so that all of one are alike."""
    if not (2 <= chunk <= LARGEST_CHUNK and chunk % 2 == 0):
        raise EvaluationError(
            f"chunks of {chunk} tokens; expected an even number from 2 to {LARGEST_CHUNK}"
        )
    return chunk


def score_continuations(
    session: Session, asked: Sequence[Continuation], chunk: int
) -> Iterator[tuple[int, Likelihood]]:
    """Likelihoods with the index of what was asked, in the order that shares the most."""
    order = sorted(range(len(asked)), key=lambda i: (asked[i].context, asked[i].tokens))
    groups = [[*group] for _, group in groupby(order, key=lambda i: asked[i].context)]
    feed = SharedFeed(session, [asked[group[0]].context for group in groups], chunk)
    for number, group in enumerate(groups):
        first = feed.whole(number)[None]  # (1, V), after the context
        end, _held = session.position, session.hold()
        for index in group:
            if session.position != end and session.rewind(end) != end:
                feed.whole(number)
                _held = session.hold()
            tokens = asked[index].tokens
            blocks = chain([first], _rows(session, tokens[:-1], chunk))
            yield index, _likelihood(blocks, tokens)


def continue_prompts(
    session: Session,
    tokenizer: Tokenizer,
    asked: Sequence[Prompt],
    stop_tokens: Collection[int],
    chunk: int,
) -> Iterator[tuple[int, str]]:
    """Generated texts with the index of what was asked, in the order that shares the most."""
    order = sorted(range(len(asked)), key=lambda i: asked[i].tokens)
    feed = SharedFeed(session, [asked[i].tokens for i in order], chunk)
    for number, index in enumerate(order):
        prompt = asked[index]
        last = feed.all_but_last(number)
        generation = generate_text(
            session,
            tokenizer,
            last,
            max_new_tokens=prompt.max_new_tokens,
            sampling=prompt.sampling,
            stop_tokens=stop_tokens,
            stop_strings=prompt.stop_strings,
            history=prompt.tokens[: -len(last)],
        )
        list(generation)
        yield index, generation.result.text


class SharedFeed:
    """Feeds sorted prompts to a session and goes back to the chunks that the next one shares."""

    def __init__(self, session: Session, prompts: Sequence[Tokens], chunk: int) -> None:
        self._session = session
        self._plans = [_cut(tokens, 0, chunk) for tokens in prompts]
        self._shared = [0, *(_common(one, next) for one, next in pairwise(self._plans))]
        self._returns = _returns(self._shared)
        self._marks: list[Mark] = []
        session.reset()

    def whole(self, number: int) -> Logits:
        """Feed a prompt; returns the logits after its last token, (V,)."""
        return self._session.prefill(self.all_but_last(number))

    def all_but_last(self, number: int) -> Tokens:
        """Feed a prompt without its last chunk, which is returned."""
        plan = self._plans[number]
        ends = [0, *accumulate(map(len, plan))]
        done = self._go_back(ends, min(self._shared[number], len(plan) - 1))
        self._hold(number, done)
        for index in range(done, len(plan) - 1):
            self._session.prefill(plan[index])
            self._hold(number, index + 1)
        return plan[-1]

    def _go_back(self, ends: Sequence[int], chunks: int) -> int:
        """Go back to the end of so many chunks, or before; returns how many are in the caches."""
        while True:
            self._marks = [mark for mark in self._marks if mark.position <= ends[chunks]]
            reached = self._session.rewind(min(ends[chunks], self._session.position))
            if reached == ends[chunks]:
                return chunks
            chunks = max(index for index, end in enumerate(ends) if end <= reached)

    def _hold(self, number: int, chunks: int) -> None:
        """Hold the place if a later prompt goes back to it."""
        held = any(mark.position == self._session.position for mark in self._marks)
        if chunks and chunks in self._returns[number] and not held:
            self._marks = [*self._marks, self._session.hold()][-_MARKS:]


def _rows(session: Session, tokens: Tokens, chunk: int) -> Iterator[Logits]:
    """Logits after each token, (T, V) at a time."""
    for part in _cut(tokens, session.position, chunk):
        yield session.score(part)


def _likelihood(blocks: Iterable[Logits], tokens: Tokens) -> Likelihood:
    total, is_greedy, done = 0.0, True, 0
    for logits in blocks:
        following = tokens[done : done + len(logits)]
        norms = log_sum_exp(logits)
        for row, norm, token in zip(logits, norms, following, strict=True):
            total += float(row[token]) - float(norm)
            is_greedy &= int(row.argmax()) == token
        done += len(logits)
    return Likelihood(total, is_greedy)


def _cut(tokens: Tokens, start: int, chunk: int) -> list[Tokens]:
    """Cut tokens that begin at position `start` where positions are multiples of `chunk`."""
    first = chunk - start % chunk
    places = [0, *range(first, len(tokens), chunk), len(tokens)]
    return [tokens[a:b] for a, b in pairwise(places) if a < b]


def _common(a: Sequence[Tokens], b: Sequence[Tokens]) -> int:
    """How many chunks both begin with."""
    count = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        count += 1
    return count


def _returns(shared: Sequence[int]) -> list[Tokens]:
    """For each prompt: to how many of its chunks later prompts go back, the most first."""
    found: list[Tokens] = [()]
    for count in reversed(shared[1:]):
        found.append((count, *(fewer for fewer in found[-1] if fewer < count)))
    return found[::-1]
