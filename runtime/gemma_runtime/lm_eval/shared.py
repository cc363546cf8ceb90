"""Scores and continues many prompts, feeding what neighbours share once.

Quantized kernels round another chunking of the same tokens differently, by as much as quantization
itself changes their logits. So each prompt is cut at the same positions whatever else is asked, and
a cached chunk is used again only if it was cut so too. An answer is then a function of its prompt
alone. T new tokens, V vocabulary.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise

from gemma_runtime.errors import EvaluationError
from gemma_runtime.marks import Mark
from gemma_runtime.proof.goldens import log_sum_exp
from gemma_runtime.session import Logits, Session
from gemma_runtime.text.generate import generate_text
from gemma_runtime.text.sampler import Sampling
from gemma_runtime.text.shared_prefix import common_length, keep_beginning
from gemma_runtime.text.tokenizer import Tokenizer

CHUNK = 32  # tokens fed at once, unless told otherwise
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
        end, held = session.position, [session.hold()]
        for index in group:
            if session.position != end and session.rewind(end) != end:
                feed.whole(number)
                held = [session.hold()]
            tokens = asked[index].tokens
            blocks = chain([first], _rows(session, tokens[:-1], chunk))
            yield index, _likelihood(blocks, tokens)
        held.clear()  # a mark that is referenced could cost a copy of the caches


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
    """Feeds sorted prompts to a session and goes back to what the next one shares."""

    def __init__(self, session: Session, prompts: Sequence[Tokens], chunk: int) -> None:
        self._session, self._prompts, self._chunk = session, prompts, chunk
        self._returns = _returns(prompts, chunk)
        self._marks: list[Mark] = []
        session.reset()

    def whole(self, number: int) -> Logits:
        """Feed a prompt; returns the logits after its last token, (V,)."""
        return self._session.prefill(self.all_but_last(number))

    def all_but_last(self, number: int) -> Tokens:
        """Feed a prompt without its last chunk, which is returned."""
        session, tokens = self._session, self._prompts[number]
        before = self._prompts[number - 1] if number else ()
        # What came after the previous prompt was cut in other places, so it is not used again.
        session.rewind(min(len(before), session.position))
        last = _last_cut(tokens, self._chunk)
        start = keep_beginning(session, tokens, last, self._chunk)
        self._marks = [mark for mark in self._marks if mark.position <= start]
        self._hold(number)
        for begin in range(start, last, self._chunk):
            session.prefill(tokens[begin : begin + self._chunk])
            self._hold(number)
        return tokens[last:]

    def _hold(self, number: int) -> None:
        """Hold the place if a later prompt goes back to it."""
        position = self._session.position
        is_held = any(mark.position == position for mark in self._marks)
        if position in self._returns[number] and not is_held:
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


def _last_cut(tokens: Tokens, chunk: int) -> int:
    """Where the last chunk begins."""
    return (len(tokens) - 1) // chunk * chunk


def _returns(prompts: Sequence[Tokens], chunk: int) -> list[Tokens]:
    """For each prompt: the positions in it that later prompts go back to, the last one first."""
    found: list[Tokens] = [()]
    for before, after in reversed([*pairwise(prompts)]):
        shared = min(common_length(before, after) // chunk * chunk, _last_cut(after, chunk))
        earlier = (position for position in found[-1] if position < shared)
        found.append((shared, *earlier) if shared else ())
    return found[::-1]
