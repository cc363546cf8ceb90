"""Holds a conversation in one session."""

import json
from collections.abc import Collection, Sequence

from gemma_runtime.errors import BakedError, ContextFull, SessionError
from gemma_runtime.marks import Mark
from gemma_runtime.session import Session
from gemma_runtime.text.baked import Baked
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.constraint import Constraint, start_constraint
from gemma_runtime.text.draft import PromptLookup
from gemma_runtime.text.frame import Languages
from gemma_runtime.text.generate import TextGeneration, generate_text
from gemma_runtime.text.matcher import Matcher
from gemma_runtime.text.opening import Opening, check_examples
from gemma_runtime.text.sampler import Sampling
from gemma_runtime.text.shared_prefix import keep_beginning
from gemma_runtime.text.tokenizer import Tokenizer
from gemma_runtime.text.tools import Json, Schema, check_tools, find_marks, tool_names

_GREEDY = Sampling()


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

    With `thinking`, the model thinks before it answers, also before a constrained answer; later
    turns don't see its thoughts. If it calls tools, it sees them until the user's next turn.

    With `languages`, codes such as ("en", "de"), a model that only translates gets each turn of the
    user as a text in the first one, to translate into the second.

    With `drafts`, repeated passages are guessed, and several tokens checked in one step.

    `examples` are turns that it begins with after the system turn, and never forgets. A `baked`
    prefix has the system turn, examples and tools itself; nothing of it is fed.
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
        examples: Sequence[Message] = (),
        roll: bool = False,
        tools: Sequence[Schema] = (),
        drafts: bool = False,
        baked: Baked | None = None,
        thinking: bool = False,
        languages: Languages | None = None,
    ) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._template = template
        self._bos_token = bos_token
        self._eos_token = eos_token
        self._stop_strings = stop_strings
        self._sampling = sampling
        given = Opening(None, system, check_examples(examples), tuple(check_tools(tools)))
        opening = given if baked is None else _baked_opening(baked, given)
        self._baked = baked
        self._tools = opening.tools
        self._marks = find_marks(template or "")
        waits = None if self._marks is None else tokenizer.token_id(self._marks.response)
        self._stop_tokens = [*stop_tokens] if waits is None else [*stop_tokens, waits]
        self._opening = opening.turns(template)
        self._roll = roll
        self._drafts = drafts
        self._thinking = thinking
        self._languages = languages
        self.reset()

    def reset(self) -> None:
        """Forget every turn except the system turn and the examples."""
        self._messages = list(self._opening)
        self._rewrites = False  # whether the template has changed an earlier turn
        self._sent = 0  # turns that the reply answers
        self._reply: TextGeneration | None = None
        self._forgotten = 0
        self._start: Mark | None = None  # after the baked prefix
        self._session.reset()
        if self._baked is not None:
            self._session.resume(self._baked.snapshot)
            self._start = self._session.hold()

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
            thought = result.thought if result.tool_calls else ""
            said = Message("assistant", result.text, result.tool_calls, thought=thought)
            return [*self._messages, said]
        return [*self._messages, Message("assistant", reply.text)]

    @property
    def forgotten(self) -> int:
        """How many turns, replies included, were forgotten because the context was full."""
        return self._forgotten

    def send(
        self,
        content: str,
        max_new_tokens: int | None = None,
        constraint: Constraint | Matcher | None = None,
    ) -> TextGeneration:
        """The model's reply to `content`. Iterate it before sending the next turn.

        A `constraint` holds this reply alone to a format; tell the model of it in `content` too.
        Without `max_new_tokens` the reply may fill the context. Raises ContextFull if the
        conversation no longer fits; its state doesn't change then. With `roll`, only a turn that
        doesn't fit by itself raises it.
        """
        return self._reply_to([Message("user", content)], max_new_tokens, constraint)

    def send_results(
        self,
        results: Sequence[Json],
        max_new_tokens: int | None = None,
        constraint: Constraint | Matcher | None = None,
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
        if self._marks is not None:
            responses = tuple({"name": call.name, "response": result} for call, result in pairs)
            turn = Message("tool", "", results=responses)
            return self._reply_to([turn], max_new_tokens, constraint)
        turns = [Message("tool", _result_text(result), name=call.name) for call, result in pairs]
        return self._reply_to(turns, max_new_tokens, constraint)

    def take_back(self) -> None:
        """Forget the last question, or results, and the reply. Without a reply nothing changes."""
        if self._reply is not None:
            self._reply.close()
            self._messages = self._messages[: -self._sent]
            self._reply = None

    def _reply_to(
        self,
        new: list[Message],
        max_new_tokens: int | None,
        constraint: Constraint | Matcher | None,
    ) -> TextGeneration:
        if max_new_tokens is None:
            max_new_tokens = self._session.context_length
        matcher = start_constraint(constraint, self._tokenizer, self._stop_tokens)
        turns = [*self.messages, *new]
        messages, tokens = self._fitting(turns, max_new_tokens)
        self._check_room(tokens)
        if self._baked is not None:
            self._baked.check_begins(tokens)
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
            constraint=matcher,
            hold=self._rewrites,
            thinking=self._thinking,
            drafter=PromptLookup() if self._drafts else None,
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
        first = len(self._opening)
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
            thinking=self._thinking,
            languages=self._languages,
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


def _baked_opening(baked: Baked, given: Opening) -> Opening:
    if given != Opening():
        raise BakedError(
            f"{baked.path} has the system turn, examples and tools of the conversation; give none"
        )
    if baked.opening.text is not None:
        raise BakedError(f"{baked.path} is a text for prompts, not the beginning of a chat")
    return baked.opening


def _result_text(result: Json) -> str:
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
