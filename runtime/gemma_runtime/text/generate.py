"""Generates tokens and text with a session, and holds conversations."""

import json
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from time import perf_counter

from gemma_runtime.errors import ContextFull, SessionError
from gemma_runtime.marks import Mark
from gemma_runtime.session import Session, check_room, check_tokens
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.sampler import Sampler, Sampling
from gemma_runtime.text.shared_prefix import keep_beginning
from gemma_runtime.text.tokenizer import Tokenizer
from gemma_runtime.text.tools import (
    ACTIVATION,
    CALL,
    RESPONSE,
    Json,
    Schema,
    ToolCall,
    check_tools,
    find_calls,
    tool_names,
)

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
    hold: bool = False,
) -> "TextGeneration":
    """Feed `prompt` and stream the generated text.

    Calls of tools with these names are read from the finished text; FunctionGemma's always.
    `history` is the tokens already in the session; only the repetition penalty uses them.
    `hold` marks the end of the prompt, so that the session can go back to it until the generation
    is closed.
    Raises ContextFull immediately, before feeding anything, if the prompt doesn't fit.
    """
    loop = _TokenLoop(session, prompt, history, max_new_tokens, sampling, stop_tokens, hold)
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
        """Stop generating: the iteration yields nothing more. Drops the mark, if there is one."""
        self._pieces.close()
        self._loop.mark = None

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


class Conversation:
    """Turns between a user and the model in one session.

    Each turn feeds only the tokens that the cache lacks. If the template renders an earlier turn
    differently from what is in the cache (for example with the reply trimmed), the session goes
    back to what they have in common. From then on it holds a mark before each reply, to go back to.

    With `roll`, a full context makes it forget the oldest turns, a question with its reply at a
    time, but never the system turn. The next reply is then that of a new conversation that begins
    with the turns kept.

    With `tools` (JSON schemas, as transformers takes them) a reply's result has the calls of tools;
    `send_results` gives the model what they returned.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        *,
        template: str | None,
        bos_token: int,
        stop_tokens: Collection[int],
        eos_token: int | None = None,
        stop_strings: Sequence[str] = (),
        sampling: Sampling = _GREEDY,
        system: str | None = None,
        roll: bool = False,
        tools: Sequence[Schema] = (),
    ) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._template = template
        self._bos_token = bos_token
        self._eos_token = eos_token
        self._stop_strings = stop_strings
        self._sampling = sampling
        self._tools = check_tools(tools)
        self._marks_calls = CALL in (template or "")
        waits = tokenizer.token_id(RESPONSE) if self._marks_calls else None
        self._stop_tokens = [*stop_tokens] if waits is None else [*stop_tokens, waits]
        self._system = self._system_turn(system)
        self._roll = roll
        self.reset()

    def _system_turn(self, system: str | None) -> list[Message]:
        """FunctionGemma has its tools in a developer turn, and needs its sentence there."""
        if self._marks_calls and self._tools:
            return [Message("developer", ACTIVATION if system is None else system)]
        return [] if system is None else [Message("system", system)]

    def reset(self) -> None:
        """Forget every turn except the system turn."""
        self._messages = list(self._system)
        self._rewrites = False  # whether the template has changed an earlier turn
        self._sent = 0  # turns that the reply answers
        self._reply: TextGeneration | None = None
        self._forgotten = 0
        self._session.reset()

    @property
    def messages(self) -> list[Message]:
        """The turns so far. An interrupted reply counts with its text so far."""
        reply = self._reply
        if reply is None:
            return list(self._messages)
        if not reply.tokens and not reply.finished:
            return self._messages[: -self._sent]  # these turns have no reply, so drop them
        if reply.finished:
            result = reply.result
            return [*self._messages, Message("assistant", result.text, result.tool_calls)]
        return [*self._messages, Message("assistant", reply.text)]

    @property
    def forgotten(self) -> int:
        """How many turns, replies included, were forgotten because the context was full."""
        return self._forgotten

    def send(self, content: str, max_new_tokens: int | None = None) -> TextGeneration:
        """The model's reply to `content`. Iterate it before sending the next turn.

        Without `max_new_tokens` the reply may fill the context. Raises ContextFull if the
        conversation no longer fits; its state doesn't change then. With `roll`, only a turn that
        doesn't fit by itself raises it.
        """
        return self._reply_to([Message("user", content)], max_new_tokens)

    def send_results(
        self, results: Sequence[Json], max_new_tokens: int | None = None
    ) -> TextGeneration:
        """The model's reply to the results of the calls in its last reply, in their order.

        Raises SessionError if there are not as many results as calls.
        """
        calls = self.messages[-1].tool_calls if self.messages else ()
        if not calls or len(results) != len(calls):
            raise SessionError(
                f"the last reply calls {len(calls)} tools, but there are {len(results)} results; "
                "give one for each call"
            )
        pairs = list(zip(calls, results, strict=True))
        if self._marks_calls:
            responses = tuple({"name": call.name, "response": result} for call, result in pairs)
            return self._reply_to([Message("tool", "", results=responses)], max_new_tokens)
        turns = [Message("tool", _result_text(result), name=call.name) for call, result in pairs]
        return self._reply_to(turns, max_new_tokens)

    def _reply_to(self, new: list[Message], max_new_tokens: int | None) -> TextGeneration:
        if max_new_tokens is None:
            max_new_tokens = self._session.context_length
        turns = [*self.messages, *new]
        messages, tokens = self._fitting(turns, max_new_tokens)
        self._check_room(tokens)
        held = self._keep_beginning(tokens)
        if self._reply is not None:
            self._reply.close()
        self._reply = generate_text(
            self._session,
            self._tokenizer,
            tokens[held:],
            max_new_tokens=max_new_tokens,
            sampling=self._sampling,
            stop_tokens=self._stop_tokens,
            stop_strings=self._stop_strings,
            history=tokens[:held],
            tools=tool_names(self._tools),
            hold=self._rewrites,
        )
        self._messages, self._sent = messages, len(new)
        self._forgotten += len(turns) - len(messages)
        return self._reply

    def _fitting(self, turns: list[Message], reply: int) -> tuple[list[Message], list[int]]:
        """The turns to feed and their tokens; with `roll`, without the oldest if there is no room.

        A quarter of the context is kept free for the reply, or all of the reply if that is less.
        """
        context = self._session.context_length
        room = context - min(reply, context // 4)
        tokens = self._encode(turns)
        first = len(self._system)
        while self._roll and len(tokens) > room:
            users = [at for at, turn in enumerate(turns) if turn.role == "user" and at > first]
            if not users:
                break
            turns = [*turns[:first], *turns[users[0] :]]
            tokens = self._encode(turns)
        return turns, tokens

    def _encode(self, turns: Sequence[Message]) -> list[int]:
        return encode_chat(
            self._tokenizer,
            self._template,
            turns,
            self._bos_token,
            self._eos_token,
            tools=self._tools,
        )

    def _keep_beginning(self, tokens: Sequence[int]) -> int:
        """Keep in the session what it can of the beginning of `tokens`; returns its length."""
        before = self._session.position
        held = keep_beginning(self._session, tokens, len(tokens) - 1)
        self._rewrites |= held < before
        return held

    def _check_room(self, tokens: Sequence[int]) -> None:
        if len(tokens) > self._session.context_length:
            raise ContextFull(
                f"the conversation has {len(tokens)} tokens, the context holds "
                f"{self._session.context_length}; start a new one, shorten the message, or export "
                "with a larger --context"
            )


def _result_text(result: Json) -> str:
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


class StopStrings:
    """Passes streamed text on up to the first stop string.

    Holds back the end of the text while it could be the beginning of a stop string.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        if "" in stop_strings:
            raise SessionError("a stop string is empty; give at least one character or omit it")
        self._stops = tuple(stop_strings)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text; return the text that can be shown now, "" after a stop string."""
        if self.found:
            return ""
        held = self._held + text
        # The stop string that ends first wins, so that the result doesn't depend on how the text
        # is split into pieces.
        starts = ((stop, held.find(stop)) for stop in self._stops)
        ends = [(start + len(stop), start) for stop, start in starts if start >= 0]
        if ends:
            self.found = True
            self._held = ""
            return held[: min(ends)[1]]
        safe = len(held) - self._partial_match(held)
        self._held = held[safe:]
        return held[:safe]

    def flush(self) -> str:
        """Return the text held back. Call it when no more text follows."""
        held, self._held = self._held, ""
        return held

    def _partial_match(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a prefix of a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


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
        hold: bool = False,
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
        self._hold = hold
        self.mark: Mark | None = None

    def __iter__(self) -> Iterator[int]:
        session = self._session
        logits = session.prefill(self.prompt)
        self.mark = session.hold() if self._hold else None
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
