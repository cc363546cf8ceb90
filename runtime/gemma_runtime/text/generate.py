"""Generates tokens and text with a session."""

from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from time import perf_counter

from gemma_runtime.errors import SessionError
from gemma_runtime.marks import Mark
from gemma_runtime.session import Logits, Session, check_room, check_tokens
from gemma_runtime.text.constraint import Constraint, start_constraint
from gemma_runtime.text.draft import Drafter
from gemma_runtime.text.matcher import Matcher, allowed_tokens
from gemma_runtime.text.sampler import Sampler, Sampling
from gemma_runtime.text.stop_strings import StopStrings
from gemma_runtime.text.thoughts import Thoughts
from gemma_runtime.text.tokenizer import Tokenizer
from gemma_runtime.text.tools import ToolCall, find_calls, find_marks

_GREEDY = Sampling()


class StopReason(StrEnum):
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    LENGTH = "length"  # max_new_tokens were generated
    CONTEXT = "context"  # the context is full
    CONSTRAINT = "constraint"  # the constraint allows nothing more


@dataclass(frozen=True, slots=True)
class Generation:
    """The result of a generation, with its timing."""

    text: str  # without the stop string
    prompt_tokens: int  # fed for this text, without those already in the cache
    new_tokens: int  # without the stop token
    reason: StopReason
    complete: bool  # not cut by a limit, nor, if it was constrained, by a stop string
    first_token_seconds: float  # from the start to the first chosen token, prefill included
    seconds: float  # in total
    steps: int  # calls of the model after the prompt
    tool_calls: tuple[ToolCall, ...] = ()  # what the model wants to call; not in the text
    thought: str = ""  # what it wrote for itself before the answer; not in the text


def generate(
    session: Session,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = _GREEDY,
    stop_tokens: Collection[int] = (),
    constraint: Matcher | None = None,
    drafter: Drafter | None = None,
) -> Iterator[int]:
    """Feed `prompt` and yield new tokens, up to a stop token (not yielded) or a full context.

    The tokens that a `drafter` guesses are checked together. A `constraint`, which guesses its
    own, is started first: `Constraint.regex("[0-9]+").start(tokenizer, stop_tokens)`.
    Raises ContextFull immediately, before feeding anything, if the prompt doesn't fit.
    """
    loop = _TokenLoop(
        session, prompt, (), max_new_tokens, sampling, stop_tokens, constraint, drafter=drafter
    )
    return iter(loop)


def generate_text(
    session: Session,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = _GREEDY,
    stop_tokens: Collection[int] = (),
    stop_strings: Sequence[str] = (),
    history: Sequence[int] = (),
    tools: Collection[str] = (),
    constraint: Constraint | Matcher | None = None,
    hold: bool = False,
    drafter: Drafter | None = None,
    thinking: bool = False,
) -> "TextGeneration":
    """Feed `prompt` and stream the generated text, which a `constraint` can hold to a format.

    Calls of tools with these names are read from the finished text; FunctionGemma's always.
    `history` is the tokens already in the session; the repetition penalty and drafts use them.
    `hold` marks the end of the prompt, so that the session can go back to it until the generation
    is closed. The tokens that a `drafter` guesses are checked together; with a constraint, which
    forces its own, it has nothing to do. A constraint doesn't hold a thought that the prompt
    begins, or with `thinking` the model; it holds what follows.
    Raises ContextFull immediately, before feeding anything, if the prompt doesn't fit, and
    ConstraintError if the constraint can't be guaranteed.
    """
    matcher = start_constraint(constraint, tokenizer, stop_tokens)
    thoughts = Thoughts(tokenizer, [*history, *prompt])
    if matcher is not None:
        matcher = thoughts.before(matcher, stop_tokens, thinking)
    loop = _TokenLoop(
        session, prompt, history, max_new_tokens, sampling, stop_tokens, matcher, hold, drafter
    )
    return TextGeneration(loop, tokenizer, thoughts, stop_strings, tools)


class TextGeneration:
    """A text being generated. Iterate it once for its pieces, each of whole characters.

    Afterwards read `result`.
    """

    def __init__(
        self,
        loop: "_TokenLoop",
        tokenizer: Tokenizer,
        thoughts: Thoughts,
        stop_strings: Sequence[str] = (),
        tools: Collection[str] = (),
    ) -> None:
        self._tools = tools
        self._thoughts = thoughts
        self._loop = loop
        self._tokenizer = tokenizer
        self._stop_strings = StopStrings(stop_strings)
        self._pieces = self._run()
        self._text = ""
        self._answer: list[int] = []  # tokens that are not of a thought
        self._result: Generation | None = None

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def text(self) -> str:
        """The text streamed so far."""
        return self._text

    @property
    def tokens(self) -> Sequence[int]:
        """The new tokens so far, without the stop token."""
        return self._loop.tokens

    @property
    def finished(self) -> bool:
        """Whether the generation has ended, so that `result` is available."""
        return self._result is not None

    @property
    def result(self) -> Generation:
        """The finished text with its figures. Raises SessionError before the iteration ends."""
        if self._result is None:
            raise SessionError("the text is not finished; iterate to its end first")
        return self._result

    def close(self) -> None:
        """Stop generating: the iteration yields nothing more. Drops the mark, if there is one."""
        self._pieces.close()
        self._loop.mark = None

    def _run(self) -> Generator[str]:
        started = perf_counter()
        decoder, thoughts = self._tokenizer.stream(), self._thoughts
        reason = None
        for token in self._loop:
            piece = decoder.push(token)
            if thoughts.take(token, piece):
                continue
            self._answer.append(token)
            yield from self._emit(self._stop_strings.push(piece))
            if self._stop_strings.found:
                reason = StopReason.STOP_STRING
                break
        if reason is None:
            last = self._stop_strings.push(thoughts.end(decoder.flush()))
            yield from self._emit(last + self._stop_strings.flush())
            reason = StopReason.STOP_STRING if self._stop_strings.found else self._loop.reason
        ended = perf_counter()
        text, calls = self._read_calls(reason)
        self._result = Generation(
            text=text,
            thought=thoughts.text,
            tool_calls=calls,
            prompt_tokens=len(self._loop.prompt),
            new_tokens=len(self._loop.tokens),
            reason=reason,
            complete=self._is_complete(reason),
            first_token_seconds=(self._loop.first_choice or ended) - started,
            seconds=ended - started,
            steps=self._loop.steps,
        )

    def _is_complete(self, reason: StopReason) -> bool:
        is_limited = reason in (StopReason.LENGTH, StopReason.CONTEXT)
        is_cut = reason is StopReason.STOP_STRING and self._loop.matcher is not None
        return not is_limited and not is_cut

    def _read_calls(self, reason: StopReason) -> tuple[str, tuple[ToolCall, ...]]:
        """The text without calls, and the calls. Their tokens may be left out of the text."""
        text = self._text
        if reason is not StopReason.STOP_STRING:
            marked = self._tokenizer.decode(self._answer, control=True)
            text = marked if find_marks(marked) else text
        rest, calls = find_calls(text, self._tools)
        return (rest, calls) if calls else (self._text, ())

    def _emit(self, text: str) -> Iterator[str]:
        if text:
            self._text += text
            yield text


class _TokenLoop:
    """The decoding loop: choose a token, yield it, feed it.

    Under a constraint, tokens that leave no choice are yielded and fed together with the choice
    before them.
    """

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        history: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop_tokens: Collection[int],
        matcher: Matcher | None,
        hold: bool = False,
        drafter: Drafter | None = None,
    ) -> None:
        check_tokens(prompt)
        check_room(session.position, len(prompt), session.context_length)
        if max_new_tokens < 1:
            raise SessionError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        self.prompt = list(prompt)
        self.tokens: list[int] = []
        self.reason = StopReason.LENGTH
        self.first_choice: float | None = None  # when it was made, by perf_counter
        self.matcher = matcher
        self._session = session
        self._previous = [*history, *prompt]
        self._max_new_tokens = max_new_tokens
        self._sampler = Sampler(sampling)
        self._stop_tokens = frozenset(stop_tokens)
        self._hold = hold
        self.mark: Mark | None = None
        self._drafter = drafter if matcher is None else None
        self.steps = 0

    def __iter__(self) -> Iterator[int]:
        unfed, run = self.prompt, self._forced()
        while True:
            room = self._room(len(unfed))
            for token in run[:room]:
                self.tokens.append(token)
                self._previous.append(token)
                yield token
            if len(run) <= room and self.matcher is not None and self.matcher.is_done:
                self.reason = StopReason.CONSTRAINT
                return
            if len(run) >= room:
                is_long = len(self.tokens) == self._max_new_tokens
                self.reason = StopReason.LENGTH if is_long else StopReason.CONTEXT
                return
            *fed, token = self._choose(unfed, run)
            for guessed in fed:
                self.tokens.append(guessed)
                yield guessed
            if token in self._stop_tokens:
                self.reason = StopReason.STOP_TOKEN
                return
            unfed, run = [], [token, *self._forced(token)]

    def _room(self, unfed: int) -> int:
        """How many tokens may still be yielded; the last one need not be fed."""
        free = self._session.context_length - self._session.position - unfed
        return min(self._max_new_tokens - len(self.tokens), free + 1)

    def _choose(self, unfed: Sequence[int], run: Sequence[int]) -> list[int]:
        """The next tokens: right guesses, which are fed already, and one more that is not."""
        self.steps += not unfed
        drafter = None if unfed else self._drafter
        drafted = [] if drafter is None else self._draft(drafter, len(run))
        if drafted:
            chosen = self._check(self._session.score([*run, *drafted])[len(run) - 1 :], drafted)
            wrong = len(drafted) - (len(chosen) - 1)
            self._session.rewind(self._session.position - wrong)
        else:
            chosen = [self._pick(self._feed(unfed, run))]
        if drafter is not None:
            drafter.judge(len(drafted), len(chosen) - 1)
        return chosen

    def _draft(self, drafter: Drafter, fed: int) -> list[int]:
        """Guesses that fit, and that the session can take back after `fed` more tokens."""
        session = self._session
        left = self._max_new_tokens - len(self.tokens) - 1
        most = min(left, session.context_length - session.position - fed)
        most = session.undoable(fed + most) - fed if most > 0 else 0
        return list(drafter.draft(self._previous, max(0, most)))

    def _check(self, rows: Logits, drafted: Sequence[int]) -> list[int]:
        """Choose tokens up to the first wrong guess, from the logits (T, V) of each place."""
        chosen: list[int] = []
        for logits, guess in zip(rows, [*drafted, None], strict=True):
            chosen.append(self._pick(logits))
            if chosen[-1] != guess or guess in self._stop_tokens:
                break
            self._previous.append(guess)
        return chosen

    def _feed(self, unfed: Sequence[int], run: Sequence[int]) -> Logits:
        if unfed and self._hold:
            logits = self._session.prefill(unfed)
            self.mark = self._session.hold()
            if not run:
                return logits
            unfed = []
        if not unfed and len(run) == 1:
            return self._session.decode(run[0])
        return self._session.prefill([*unfed, *run])

    def _pick(self, logits: Logits) -> int:
        allowed = None
        if self.matcher is not None:
            allowed = allowed_tokens(self.matcher.mask(), len(logits))
        token = self._sampler.pick(logits, self._previous, allowed)
        if self.first_choice is None:
            self.first_choice = perf_counter()
        return token

    def _forced(self, *chosen: int) -> list[int]:
        """The tokens that the constraint forces after those chosen, up to the next choice."""
        if self.matcher is None:
            return []
        for token in chosen:
            self.matcher.accept(token)
        forced = list(self.matcher.forced())
        for token in forced:
            self.matcher.accept(token)
        return forced
