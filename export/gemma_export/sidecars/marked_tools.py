"""Writes tools, calls and results in the syntax of Gemma 4's chat template, as phones do.

Source: the canonical chat template of google/gemma-4 (2026-07-09), whose output this reproduces.
Keys are sorted without regard to case. Of a property it writes the description, a text's `enum`,
a list's `items`, `nullable`, an object's `properties` and `required`, and the type in capitals.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gemma_export.sidecars.chat_texts import ChatFormat, ToolMarks
from gemma_runtime.text.chat import Message
from gemma_runtime.text.tools import Json, Schema, ToolCall

_STANDARD = ("description", "type", "properties", "required", "nullable")


@dataclass(frozen=True, slots=True)
class MarkedTools:
    marks: ToolMarks

    def render(self, chat: ChatFormat, tools: Sequence[Schema], turns: Sequence[Message]) -> str:
        """Render turns, of which those of the model hold their results, up to the reply."""
        system = turns[0].role == "system"
        text = chat.system if system or tools else chat.first
        text += chat.shown("system", turns[0].content) if system else ""
        text += "".join(map(self.declaration, tools))
        text += chat.system_to_user if system or tools else ""
        turns = turns[1:] if system else turns
        last_user = max(at for at, turn in enumerate(turns) if turn.role == "user")
        for at, turn in enumerate(turns):
            after = turns[at + 1].role if at + 1 < len(turns) else None
            text += self._turn(chat, turn, at > last_user) + self._between(chat, turn, after)
        return text

    def _turn(self, chat: ChatFormat, turn: Message, is_new: bool) -> str:
        opens, closes = self.marks.thought
        thought = f"{opens}{turn.thought}{closes}" if turn.thought and is_new else ""
        calls = "".join(map(self.call, turn.tool_calls))
        results = "".join(map(self.response, turn.results))
        return thought + calls + results + chat.shown(turn.role, turn.content)

    def _between(self, chat: ChatFormat, turn: Message, after: str | None) -> str:
        """The text between a turn and the next one, or the reply."""
        if turn.role == "user":
            return chat.reply if after is None else chat.user_to_assistant
        if after is None:
            said = chat.shown(turn.role, turn.content)
            return self.marks.reply_after_text if said else self.marks.reply
        if after == "assistant":
            return ""
        is_open = turn.tool_calls and not turn.results
        return self.marks.unanswered if is_open else chat.assistant_to_user

    def declaration(self, tool: Schema) -> str:
        function = tool["function"]
        opens, closes = self.marks.declaration
        text = f"{opens}{function['name']}{{description:{self._text(function.get('description'))}"
        if parameters := function.get("parameters"):
            text += f",parameters:{{{self._parameters(parameters)}"
        if "response" in function:
            text += f",response:{{{self._response(_fields(function['response']))}"
        return f"{text}}}{closes}"

    def call(self, call: ToolCall) -> str:
        opens, closes = self.marks.call
        return f"{opens}{call.name}{self.value(call.arguments, False)}{closes}"

    def response(self, result: Schema) -> str:
        opens, closes = self.marks.response
        response = result["response"]
        fields = response if isinstance(response, Mapping) else {"value": response}
        return f"{opens}{result['name']}{self.value(fields, False)}{closes}"

    def value(self, value: Json, quoted_keys: bool) -> str:
        if isinstance(value, str):
            return self._text(value)
        if value is None or isinstance(value, bool):
            return {None: "null", True: "true", False: "false"}[value]
        if isinstance(value, Mapping):
            key = self._text if quoted_keys else str
            pairs = [f"{key(name)}:{self.value(of, quoted_keys)}" for name, of in _sorted(value)]
            return f"{{{','.join(pairs)}}}"
        if isinstance(value, Sequence):
            return f"[{','.join(self.value(item, quoted_keys) for item in value)}]"
        return str(value)

    def _parameters(self, schema: Schema) -> str:
        """Without a type the brace stays open, as in the template."""
        text = ""
        if properties := schema.get("properties"):
            text += f"properties:{{{self._properties(properties)}}},"
        if required := schema.get("required"):
            text += f"{self._required(required)},"
        return text + (f"type:{self._type(schema)}}}" if schema.get("type") else "")

    def _response(self, schema: Schema) -> str:
        """For a type other than an object's the brace stays open, as in the template."""
        text = ""
        if description := schema.get("description"):
            text += f"description:{self._text(description)},"
        is_object = schema.get("type", "").upper() == "OBJECT"
        return text + (f"type:{self._type(schema)}}}" if is_object else "")

    def _properties(self, properties: Schema, leave_out: Iterable[str] = ()) -> str:
        return ",".join(
            f"{name}:{{{','.join(self._property(_fields(schema)))}}}"
            for name, schema in _sorted(properties)
            if name not in leave_out
        )

    def _property(self, schema: Schema) -> list[str]:
        kind, parts = schema.get("type", "").upper(), []
        if description := schema.get("description"):
            parts.append(f"description:{self._text(description)}")
        if kind == "STRING" and schema.get("enum"):
            parts.append(f"enum:{self.value(schema['enum'], True)}")
        if kind == "ARRAY" and (items := _fields(schema.get("items"))):
            parts.append(f"items:{{{','.join(self._items(items))}}}")
        if schema.get("nullable"):
            parts.append("nullable:true")
        if kind == "OBJECT":
            properties = schema.get("properties")
            inner = (
                self._properties(properties)
                if isinstance(properties, Mapping)
                else self._properties(schema, _STANDARD)
            )
            parts.append(f"properties:{{{inner}}}")
            if required := schema.get("required"):
                parts.append(self._required(required))
        return [*parts, f"type:{self._type(schema)}"]

    def _items(self, items: Schema) -> list[str]:
        write: Mapping[str, Callable[[Json], str]] = {
            "properties": lambda of: f"properties:{{{self._properties(_fields(of))}}}",
            "required": self._required,
            "type": lambda of: f"type:{self._text(of.upper())}",
        }
        return [
            write[name](of) if name in write else f"{name}:{self.value(of, True)}"
            for name, of in _sorted(items)
            if of is not None
        ]

    def _required(self, names: Sequence[str]) -> str:
        return f"required:[{','.join(map(self._text, names))}]"

    def _type(self, schema: Schema) -> str:
        return self._text(schema.get("type", "").upper())

    def _text(self, text: str | None) -> str:
        return f"{self.marks.quote}{text or ''}{self.marks.quote}"


def _fields(value: Json) -> Schema:
    """A schema that is no object, such as true, has nothing that is written."""
    return value if isinstance(value, Mapping) else {}


def _sorted(fields: Schema) -> list[tuple[str, Json]]:
    return sorted(fields.items(), key=lambda field: field[0].lower())
