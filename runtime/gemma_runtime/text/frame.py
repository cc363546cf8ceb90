"""A chat template with what it may write besides the turns."""

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


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """A template, and the bos and eos pieces that it may write."""

    template: str
    bos: str
    eos: str
    tools: list[Schema] | None = None
    thinking: bool = False

    def render(self, turns: Sequence[tuple[str, str] | dict[str, Json]]) -> str:
        """Render turns, as (role, content) or whole, as text, up to the start of the reply."""
        names = {
            "messages": [
                turn if isinstance(turn, dict) else {"role": turn[0], "content": turn[1]}
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

    def leaves_out_tools(self) -> bool:
        """Whether the template writes the same text with tools as without."""
        function = {"name": "f", "description": "f", "parameters": {"type": "object"}}
        probe = replace(self, tools=[{"type": "function", "function": function}])
        try:
            return probe.render([("user", "0")]) == self.render([("user", "0")])
        except TokenizerError:
            return False  # it reads the tools, or wants another conversation
