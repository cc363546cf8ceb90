"""Tokens and text out of a session."""

from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from time import perf_counter

from gemma_runtime.errors import ContextFull, SessionError
from gemma_runtime.session import Session, check_room, check_tokens
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.sampler import Sampler, Sampling
from gemma_runtime.text.tokenizer import Tokenizer

_GREEDY = Sampling()


class StopReason(StrEnum):
    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    LENGTH = "length"  # max_new_tokens were made
    CONTEXT = "context"  # the caches are full


@dataclass(frozen=True, slots=True)
class Generation:
    """What came of a prompt, and how long it took."""

    text: str  # up to a stop string, which is left out
    prompt_tokens: int  # fed for this text; not those that were in the cache before
    new_tokens: int  # without the stop token
    reason: StopReason
    first_token_seconds: float  # from the start to the first choice, prefill included
    seconds: float


def generate(
    session: Session,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = _GREEDY,
    stop_tokens: Collection[int] = (),
) -> Iterator[int]:
    """Feed `prompt` and yield new tokens, until a stop token (not yielded) or a full context.

    Raises ContextFull at once, before anything is written, if the prompt doesn't fit.
    """
    return iter(_Steps(session, prompt, (), max_new_tokens, sampling, stop_tokens))


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
) -> "TextGeneration":
    """Feed `prompt` and stream the text that follows it.

    `history` are the tokens the session holds already; only a repetition penalty reads them.
    Raises ContextFull at once, before anything is written, if the prompt doesn't fit.
    """
    steps = _Steps(session, prompt, history, max_new_tokens, sampling, stop_tokens)
    return TextGeneration(steps, tokenizer, stop_strings)


class TextGeneration:
    """A text under way: iterate it once, for whole characters as they come; then read `result`."""

    def __init__(
        self, steps: "_Steps", tokenizer: Tokenizer, stop_strings: Sequence[str] = ()
    ) -> None:
        self._steps = steps
        self._tokenizer = tokenizer
        self._cut = StopStrings(stop_strings)
        self._pieces = self._run()
        self._text = ""
        self._result: Generation | None = None

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def text(self) -> str:
        """What was streamed so far."""
        return self._text

    @property
    def tokens(self) -> Sequence[int]:
        """The new tokens so far, the stop token left out."""
        return self._steps.tokens

    @property
    def finished(self) -> bool:
        """Whether `result` can be read."""
        return self._result is not None

    @property
    def result(self) -> Generation:
        """The whole; raises SessionError while there is more to iterate."""
        if self._result is None:
            raise SessionError("the text is not finished; iterate it to its end, then ask again")
        return self._result

    def close(self) -> None:
        """End it here: nothing more is iterated."""
        self._pieces.close()

    def _run(self) -> Generator[str]:
        started = perf_counter()
        first: float | None = None
        decoder = self._tokenizer.stream()
        reason = None
        for token in self._steps:
            if first is None:
                first = perf_counter() - started
            yield from self._say(self._cut.push(decoder.push(token)))
            if self._cut.found:
                reason = StopReason.STOP_STRING
                break
        if reason is None:
            yield from self._say(self._cut.push(decoder.flush()) + self._cut.flush())
            reason = StopReason.STOP_STRING if self._cut.found else self._steps.reason
        seconds = perf_counter() - started
        self._result = Generation(
            text=self._text,
            prompt_tokens=len(self._steps.prompt),
            new_tokens=len(self._steps.tokens),
            reason=reason,
            first_token_seconds=seconds if first is None else first,
            seconds=seconds,
        )

    def _say(self, text: str) -> Iterator[str]:
        if text:
            self._text += text
            yield text


class Conversation:
    """Turns between a user and the model, sharing one cache.

    Each turn feeds only what the cache lacks. When the template writes an earlier turn otherwise
    than the model did (it trims the reply, say), the cache is emptied and fed anew.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        *,
        template: str | None,
        bos_token: int,
        stop_tokens: Collection[int],
        stop_strings: Sequence[str] = (),
        sampling: Sampling = _GREEDY,
        system: str | None = None,
    ) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._template = template
        self._bos_token = bos_token
        self._stop_tokens = stop_tokens
        self._stop_strings = stop_strings
        self._sampling = sampling
        self._begin = [] if system is None else [Message("system", system)]
        self.reset()

    def reset(self) -> None:
        """Forget every turn but the system's."""
        self._messages = list(self._begin)
        self._fed: list[int] = []
        self._reply: TextGeneration | None = None
        self._session.reset()

    @property
    def messages(self) -> list[Message]:
        """The turns so far. A reply broken off counts as far as it came."""
        reply = self._reply
        if reply is None:
            return list(self._messages)
        if not reply.tokens and not reply.finished:
            return self._messages[:-1]  # never answered: as if not asked
        return [*self._messages, Message("assistant", reply.text)]

    def send(self, content: str, max_new_tokens: int | None = None) -> TextGeneration:
        """The model's reply to `content`, to be iterated before the next turn is sent.

        Without `max_new_tokens` it may fill the context. Raises ContextFull, and stays as it was,
        if the conversation no longer fits.
        """
        messages = [*self.messages, Message("user", content)]
        tokens = encode_chat(self._tokenizer, self._template, messages, self._bos_token)
        self._check_room(tokens)
        if self._reply is not None:
            self._reply.close()
        if max_new_tokens is None:
            max_new_tokens = self._session.context_length
        cached = self._cached()
        if len(cached) != self._session.position or cached != tokens[: len(cached)]:
            self._session.reset()
            cached = []
        self._reply = generate_text(
            self._session,
            self._tokenizer,
            tokens[len(cached) :],
            max_new_tokens=max_new_tokens,
            sampling=self._sampling,
            stop_tokens=self._stop_tokens,
            stop_strings=self._stop_strings,
            history=cached,
        )
        self._messages, self._fed = messages, tokens
        return self._reply

    def _cached(self) -> list[int]:
        """What the session has been fed, as far as this conversation knows."""
        new = [] if self._reply is None else self._reply.tokens
        return [*self._fed, *new][: self._session.position]

    def _check_room(self, tokens: Sequence[int]) -> None:
        if len(tokens) > self._session.context_length:
            raise ContextFull(
                f"the conversation has {len(tokens)} tokens, the context holds "
                f"{self._session.context_length}; start a new one, say less, or export with a "
                "larger --context"
            )


class StopStrings:
    """Lets text through up to the first stop string, holding back only what could begin one."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        if "" in stop_strings:
            raise SessionError("a stop string is empty; give at least one character, or none")
        self._stops = tuple(stop_strings)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is safe to show; after a stop string nothing is."""
        if self.found:
            return ""
        held = self._held + text
        # The one that ends first wins: what is shown can't depend on where the pieces were cut.
        places = ((stop, held.find(stop)) for stop in self._stops)
        ends = [(at + len(stop), at) for stop, at in places if at >= 0]
        if ends:
            self.found = True
            self._held = ""
            return held[: min(ends)[1]]
        keep = len(held) - self._beginning(held)
        self._held = held[keep:]
        return held[:keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class _Steps:
    """The loop: choose a token, yield it, feed it."""

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
