"""Turns lm_eval's texts into token ids, as lm_eval's own `hf` model does.

bos comes first, except where the caller or the chat template says otherwise. Names of control
tokens in a question stay text, also in a chat, where `hf` makes tokens of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import EvaluationError, TokenizerError
from gemma_runtime.text.chat import Message, encode_chat, render_chat
from gemma_runtime.text.frame import CANONICAL_TEMPLATE
from gemma_runtime.text.tokenizer import Tokenizer

_Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class _Chat:
    """A rendered conversation: its ids up to the last control token, and the text after that."""

    head: tuple[int, ...]
    tail: str


class PromptEncoder:
    def __init__(self, bundle: Bundle, tokenizer: Tokenizer) -> None:
        manifest = bundle.manifest
        self._tokenizer = tokenizer
        self._bos_token, self._eos_token = manifest.bos_token, manifest.eos_token
        self._bos = tokenizer.piece(manifest.bos_token) or ""
        self._template = manifest.chat_template
        self._chats: dict[str, _Chat] = {}

    @property
    def template(self) -> str:
        """Jinja, the bundle's or ours."""
        return CANONICAL_TEMPLATE if self._template is None else self._template

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """The ids of a prompt. A text that begins with `<bos>` is a rendered chat."""
        chat = self._chats.get(text)
        if chat is not None:
            return [*chat.head, *self._tokenizer.encode(chat.tail)]
        if self._bos and text.startswith(self._bos):  # rendered by an earlier process
            return self._tokenizer.encode(text, control=True)
        return [*([self._bos_token] if bos else []), *self._tokenizer.encode(text)]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of what follows it.

        They are encoded together and then parted. White space at the context's end belongs to the
        continuation, as tokens begin with it.
        """
        chat = self._chats.get(context)
        stripped = context.rstrip()
        if chat is None:
            whole, start = self.encode(context + continuation), self.encode(stripped)
        else:
            tail = chat.tail[: len(chat.tail) - len(context) + len(stripped)]
            whole = [*chat.head, *self._tokenizer.encode(chat.tail + continuation)]
            start = [*chat.head, *self._tokenizer.encode(tail)]
        if len(whole) <= len(start):
            raise EvaluationError(f"the choice {continuation!r} adds no token to its prompt")
        return start, whole[len(start) :]

    def render(self, turns: Sequence[Mapping[str, str]], *, reply: bool = True) -> str:
        """A conversation as text that `encode` and `encode_pair` know again.

        Without `reply` the last turn is the beginning of the model's reply. Raises TokenizerError
        if the turns don't alternate or the template fails.
        """
        begun = "" if reply or turns[-1]["role"] != "assistant" else turns[-1]["content"].strip()
        asked = turns[:-1] if begun else turns
        messages = [Message(cast(_Role, turn["role"]), turn["content"]) for turn in asked]
        arguments = (self._tokenizer, self._template, messages, self._bos_token, self._eos_token)
        text, ids = render_chat(*arguments), encode_chat(*arguments)
        control = [index for index, token in enumerate(ids) if self._is_control(token)]
        end = control[-1] + 1 if control else 0
        tail = text.rpartition(self._tokenizer.piece(ids[end - 1]) or "")[2] if control else text
        if self._tokenizer.encode(tail) != ids[end:]:
            raise TokenizerError(
                "the chat template writes a message after its last control token; "
                "run without --apply-chat-template"
            )
        self._chats[text + begun] = _Chat(tuple(ids[:end]), tail + begun)
        return text + begun

    def _is_control(self, token: int) -> bool:
        return token in self._tokenizer.control_tokens
