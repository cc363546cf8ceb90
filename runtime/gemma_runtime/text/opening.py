"""What prompts begin with: a text, or the system turn, tools and examples of chats."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import msgspec

from gemma_runtime.errors import TokenizerError
from gemma_runtime.formats.json_bytes import decode_json
from gemma_runtime.manifest import Manifest
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.frame import Languages
from gemma_runtime.text.shared_prefix import common_length
from gemma_runtime.text.tokenizer import Tokenizer
from gemma_runtime.text.tools import ACTIVATION, FUNCTION_GEMMA, Schema

# Beginnings of what may follow. A token that one of them changes belongs to what follows.
_NEXT = ("a", "The", "7", "(", '"', "-", "<", "#", "é", "你", "🙂", "s", " a", "\na", "\n\na", "::")


@dataclass(frozen=True, slots=True)
class Opening:
    """The beginning of a prompt. `text` is for plain prompts, the rest for chats."""

    text: str | None = None
    system: str | None = None
    examples: tuple[Message, ...] = ()  # turns of user and assistant
    tools: tuple[Schema, ...] = ()

    def turns(self, template: str | None) -> list[Message]:
        """The turns of a chat, before the first one of the user."""
        system = self.system
        if FUNCTION_GEMMA.call in (template or "") and self.tools:
            # FunctionGemma has its tools in a developer turn, and needs its sentence there.
            return [Message("developer", ACTIVATION if system is None else system), *self.examples]
        return [*([] if system is None else [Message("system", system)]), *self.examples]

    def encode(
        self,
        tokenizer: Tokenizer,
        manifest: Manifest,
        content: str,
        thinking: bool = False,
        languages: Languages | None = None,
    ) -> list[int]:
        """The tokens of a prompt: the text and what follows it, or a chat with a turn of the user.

        Raises TokenizerError if the template refuses it.
        """
        if self.text is not None:
            return [manifest.bos_token, *tokenizer.encode(self.text + content)]
        return encode_chat(
            tokenizer,
            manifest.chat_template,
            [*self.turns(manifest.chat_template), Message("user", content)],
            manifest.bos_token,
            manifest.eos_token,
            tools=self.tools,
            thinking=thinking,
            languages=languages,
        )

    def prefix(self, tokenizer: Tokenizer, manifest: Manifest) -> list[int]:
        """The tokens that all prompts with this opening begin with, whatever follows."""
        first, *others = (self.encode(tokenizer, manifest, content) for content in _NEXT)
        return reduce(lambda kept, other: kept[: common_length(kept, other)], others, first)


def read_examples(path: Path) -> tuple[Message, ...]:
    """Turns from a file: a JSON list of {"role": "user" or "assistant", "content": …}.

    Raises TokenizerError.
    """
    try:
        turns = decode_json(read_text(path), list[Message])
    except msgspec.DecodeError as error:  # ValidationError is one
        raise TokenizerError(f"{path} is not a list of turns: {error}") from error
    return check_examples(turns)


def check_examples(turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns, if a user's turn can follow them. Raises TokenizerError."""
    if turns and (turns[0].role != "user" or turns[-1].role != "assistant"):
        raise TokenizerError(
            f"the examples go from {turns[0].role!r} to {turns[-1].role!r}; begin with a turn of "
            "the user and end with one of the assistant"
        )
    return tuple(turns)


def read_text(path: Path) -> str:
    """A file's text, without the line break at its end. Raises TokenizerError."""
    try:
        return path.read_bytes().decode().removesuffix("\n")
    except OSError as error:
        raise TokenizerError(f"can't read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"byte {error.start} of {path} is not UTF-8; convert it") from error
