"""A chat template with what it may write besides the turns."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gemma_runtime.errors import TokenizerError
from gemma_runtime.text.template import render_template
from gemma_runtime.text.tools import Json, Schema

# For checkpoints without a template: Gemma's turn format, written by us.
CANONICAL_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == "system" %}{{ raise_exception("no system turn") }}{% endif %}
    {%- set speaker = "model" if message.role == "assistant" else "user" %}
    {{- "<start_of_turn>" + speaker + "\\n" + message.content | trim + "<end_of_turn>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<start_of_turn>model\\n" }}
{%- endif %}
"""

Languages = tuple[str, str]  # codes of the language of a text, and of its translation
_SOURCE, _TARGET = "source_lang_code", "target_lang_code"
_CODE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*")


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """A template, and the bos and eos pieces that it may write."""

    template: str
    bos: str
    eos: str
    tools: list[Schema] | None = None
    thinking: bool = False
    languages: Languages | None = None

    def render(self, turns: Sequence[tuple[str, str] | dict[str, Json]]) -> str:
        """Render turns, as (role, content) or whole, as text, up to the start of the reply."""
        names = {
            "messages": [
                self._with_languages(
                    turn if isinstance(turn, dict) else {"role": turn[0], "content": turn[1]}
                )
                for turn in turns
            ],
            "add_generation_prompt": True,
            "bos_token": self.bos,
            "eos_token": self.eos,
            "tools": self.tools,
            "documents": None,
            **({"enable_thinking": True} if self.thinking else {}),
        }
        return render_template(self.template, names)

    def with_thinking(self) -> "ChatFrame":
        """The frame with thinking on. Raises TokenizerError if the template ignores it."""
        thinks, turns = replace(self, thinking=True), [("user", "0")]
        if thinks.render(turns) == self.render(turns):
            raise TokenizerError(
                "the chat template knows no `enable_thinking`; chat without thinking"
            )
        return thinks

    def translating(self, languages: Languages | None) -> "ChatFrame":
        """The frame with these languages, if it is of a model that translates.

        Raises TokenizerError if it is and there are none, or if it isn't and there are some.
        """
        translates = _SOURCE in self.template
        if translates and languages is None:
            raise TokenizerError(
                "the chat template translates; say from which language into which, e.g. "
                "--translate en:de"
            )
        if languages is not None and not translates:
            raise TokenizerError(
                f"the chat template reads no {_SOURCE}; leave --translate out, and ask for a "
                "translation in the prompt"
            )
        return replace(self, languages=languages)

    def _with_languages(self, turn: dict[str, Json]) -> dict[str, Json]:
        """A turn of the user as TranslateGemma's template takes it: a list with one text."""
        content = turn["content"]
        if self.languages is None or turn["role"] != "user" or not isinstance(content, str):
            return turn
        codes = dict(zip((_SOURCE, _TARGET), self.languages, strict=True))
        return {**turn, "content": [{"type": "text", **codes, "text": content}]}

    def leaves_out_tools(self) -> bool:
        """Whether the template writes the same text with tools as without."""
        function = {"name": "f", "description": "f", "parameters": {"type": "object"}}
        probe = replace(self, tools=[{"type": "function", "function": function}])
        try:
            return probe.render([("user", "0")]) == self.render([("user", "0")])
        except TokenizerError:
            return False  # it reads the tools, or wants another conversation


def read_languages(text: str) -> Languages:
    """The codes in `en:de` or `zh-Hant:pt_BR`. Raises TokenizerError."""
    source, separator, target = text.partition(":")
    if not separator or not all(map(_CODE.fullmatch, (source, target))):
        raise TokenizerError(
            f"--translate is {text!r:.40}, expected two language codes, e.g. en:de or zh-Hant:pt_BR"
        )
    return source, target
