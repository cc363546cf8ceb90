"""Generates tokens and text with a session."""

from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from time import perf_counter

from gemma_runtime.errors import SessionError
from gemma_runtime.session import Session, check_room, check_tokens
from gemma_runtime.text.sampler import Sampler, Sampling
from gemma_runtime.text.stop_strings import StopStrings
from gemma_runtime.text.tokenizer import Tokenizer
from gemma_runtime.text.tools import CALL, ToolCall, find_calls

_GREEDY = Sampling()


class StopReason(StrEnum):
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    LENGTH = "length"  # max_new_tokens were generated
    CONTEXT = "context"  # the context is full


@dataclass(frozen=True, slots=True)
class Generation:
    """The result of a generation, with its timing."""

    text: str  # without the stop string
    prompt_tokens: int  # fed for this text, without those already in the cache
    new_tokens: int  # without the stop token
    reason: StopReason
    first_token_seconds: float  # from the start to the first chosen token, prefill included
    seconds: float  # in total
    tool_calls: tuple[ToolCall, ...] = ()  # what the model wants to call; not in the text


def generate(
    session: Session,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = _GREEDY,
    stop_tokens: Collection[int] = (),
) -> Iterator[int]:
    """Feed `prompt` and yield new tokens, up to a stop token (not yielded) or a full context.

    Raises ContextFull immediately, before feeding anything, if the prompt doesn't fit.
    """
    return iter(_TokenLoop(session, prompt, (), max_new_tokens, sampling, stop_tokens))


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
) -> "TextGeneration":
    """Feed `prompt` and stream the generated text.

    Calls of tools with these names are read from the finished text; FunctionGemma's always.
    `history` is the tokens already in the session; only the repetition penalty uses them.
    Raises ContextFull immediately, before feeding anything, if the prompt doesn't fit.
    """
    loop = _TokenLoop(session, prompt, history, max_new_tokens, sampling, stop_tokens)
    return TextGeneration(loop, tokenizer, stop_strings, tools)


class TextGeneration:
    """A text being generated. Iterate it once for its pieces, each of whole characters.

    Afterwards read `result`.
    """

    def __init__(
        self,
        loop: "_TokenLoop",
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        tools: Collection[str] = (),
    ) -> None:
        self._tools = tools
        self._loop = loop
        self._tokenizer = tokenizer
        self._stop_strings = StopStrings(stop_strings)
        self._pieces = self._run()
        self._text = ""
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
        """Stop generating: the iteration yields nothing more."""
        self._pieces.close()

    def _run(self) -> Generator[str]:
        started = perf_counter()
        first: float | None = None
        decoder = self._tokenizer.stream()
        reason = None
        for token in self._loop:
            if first is None:
                first = perf_counter() - started
            yield from self._emit(self._stop_strings.push(decoder.push(token)))
            if self._stop_strings.found:
                reason = StopReason.STOP_STRING
                break
        if reason is None:
            last = self._stop_strings.push(decoder.flush())
            yield from self._emit(last + self._stop_strings.flush())
            reason = StopReason.STOP_STRING if self._stop_strings.found else self._loop.reason
        seconds = perf_counter() - started
        text, calls = self._read_calls(reason)
        self._result = Generation(
            text=text,
            tool_calls=calls,
            prompt_tokens=len(self._loop.prompt),
            new_tokens=len(self._loop.tokens),
            reason=reason,
            first_token_seconds=seconds if first is None else first,
            seconds=seconds,
        )

    def _read_calls(self, reason: StopReason) -> tuple[str, tuple[ToolCall, ...]]:
        """The text without calls, and the calls. Their tokens may be left out of the text."""
        text = self._text
        if reason is not StopReason.STOP_STRING:
            marked = self._tokenizer.decode(self._loop.tokens, control=True)
            text = marked if CALL in marked else text
        rest, calls = find_calls(text, self._tools)
        return (rest, calls) if calls else (self._text, ())

    def _emit(self, text: str) -> Iterator[str]:
        if text:
            self._text += text
            yield text


class _TokenLoop:
    """The decoding loop: choose a token, yield it, feed it."""

    def __init__(
        self,
        session: Session,
        prompt: Sequence[int],
        history: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop_tokens: Collection[int],
    ) -> None:
        check_tokens(prompt)
        check_room(session.position, len(prompt), session.context_length)
        if max_new_tokens < 1:
            raise SessionError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        self.prompt = list(prompt)
        self.tokens: list[int] = []
        self.reason = StopReason.LENGTH
        self._session = session
        self._previous = [*history, *prompt]
        self._max_new_tokens = max_new_tokens
        self._sampler = Sampler(sampling)
        self._stop_tokens = frozenset(stop_tokens)

    def __iter__(self) -> Iterator[int]:
        session = self._session
        logits = session.prefill(self.prompt)
        while True:
            token = self._sampler.pick(logits, self._previous)
            if token in self._stop_tokens:
                self.reason = StopReason.STOP_TOKEN
                return
            self.tokens.append(token)
            self._previous.append(token)
            yield token
            if len(self.tokens) == self._max_new_tokens:
                return
            if session.position == session.context_length:
                self.reason = StopReason.CONTEXT
                return
            logits = session.decode(token)
