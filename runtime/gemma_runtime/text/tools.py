"""Tools (functions that a model can call): their schemas, and the calls in a reply.

These formats of calls are read:
- FunctionGemma's `<start_function_call>call:name{key:<escape>text<escape>}<end_function_call>`
  https://ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices
- Gemma 4's `<|tool_call>call:name{key:<|"|>text<|"|>}<tool_call|>`
  https://ai.google.dev/gemma/docs/capabilities/text/function-calling-gemma4
- Gemma 3's JSON `{"name": "name", "parameters": {"key": "text"}}`, alone or in a list, and
- Gemma 3's Python `[name(key="text")]`; both may stand in a fenced block.
  https://ai.google.dev/gemma/docs/capabilities/function-calling
"""

import ast
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_runtime.errors import TokenizerError

Json = Any  # what a JSON text can hold
Schema = Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Marks:
    """The control tokens of a family around calls, texts in them, and results."""

    call: str
    call_end: str
    quote: str  # on both sides of a text
    response: str  # the model writes it when it waits for results


FUNCTION_GEMMA = Marks(
    "<start_function_call>", "<end_function_call>", "<escape>", "<start_function_response>"
)
GEMMA4 = Marks("<|tool_call>", "<tool_call|>", '<|"|>', "<|tool_response>")
# FunctionGemma is trained to call functions after this sentence only.
ACTIVATION = "You are a model that can do function calling with the following functions"
# Gemma 3 has no tokens for tools: this prompt is the documented way.
PROMPT = """\
You have access to functions. If you decide to invoke any of the function(s),
you MUST put it in the format of
{"name": function name, "parameters": dictionary of argument name and its value}

You SHOULD NOT include any other text in the response if you call a function
"""
_FENCED = re.compile(r"```(?:json|tool_code|tool_call|python)?[^\S\n]*\n(.*?)```", re.DOTALL)
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
_WORDS: Mapping[str, Json] = {"true": True, "false": False, "null": None, "none": None}


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: Mapping[str, Json]


def read_tools(path: Path) -> list[Schema]:
    """The JSON schemas in a file: a list. Raises TokenizerError."""
    try:
        return check_tools(json.loads(path.read_text("utf-8")))
    except OSError as error:
        raise TokenizerError(f"can't read {path}: {error.strerror}") from error
    except (RecursionError, ValueError) as error:
        raise TokenizerError(f"{path} is not JSON: {error}") from error
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


def check_tools(tools: Sequence[Schema]) -> list[Schema]:
    """The schemas in the form {"type": "function", "function": {"name": …}}.

    Raises TokenizerError for anything that is not a list of schemas with names.
    """
    if not isinstance(tools, list | tuple):
        raise TokenizerError("expected a list of tools, each a JSON schema with a name")
    schemas: list[Schema] = []
    for tool in tools:
        is_bare = isinstance(tool, Mapping) and "function" not in tool
        schema = {"type": "function", "function": tool} if is_bare else tool
        function = schema.get("function") if isinstance(schema, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            raise TokenizerError(f"tool {len(schemas) + 1} has no name; expected a JSON schema")
        schemas.append(schema)
    return schemas


def tool_names(tools: Sequence[Schema]) -> frozenset[str]:
    return frozenset(tool["function"]["name"] for tool in tools)


def tool_prompt(tools: Sequence[Schema]) -> str:
    """Tools as Gemma 3's documented prompt, for templates that leave them out."""
    functions = [tool["function"] for tool in tools]
    return PROMPT + json.dumps(functions, ensure_ascii=False, indent=2)


def call_text(calls: Sequence[ToolCall]) -> str:
    """Calls as the documented prompt asks the model to write them."""
    written = [{"name": call.name, "parameters": call.arguments} for call in calls]
    return json.dumps(written[0] if len(written) == 1 else written, ensure_ascii=False)


def find_marks(text: str) -> Marks | None:
    """The marks of calls that a reply or a template uses."""
    return next((marks for marks in (FUNCTION_GEMMA, GEMMA4) if marks.call in text), None)


def find_calls(text: str, names: Collection[str]) -> tuple[str, tuple[ToolCall, ...]]:
    """A reply without its calls, and the calls. A call that can't be read is left in the text."""
    if marks := find_marks(text):
        return _find_marked(text, marks)
    if not names:
        return text, ()
    for start, stop, body in _bodies(text):
        calls = _read_json(body) or _read_python(body)
        if calls and all(call.name in names for call in calls):
            return (text[:start] + text[stop:]).strip(), calls
    return text, ()


def _find_marked(text: str, marks: Marks) -> tuple[str, tuple[ToolCall, ...]]:
    calls: list[ToolCall] = []

    def take(match: re.Match[str]) -> str:
        body = match[2].rstrip()
        try:
            value, end = _Values(body, marks.quote).value(0)
        except (IndexError, ValueError, RecursionError):
            return match[0]
        if not isinstance(value, dict) or end != len(body):
            return match[0]
        calls.append(ToolCall(match[1].strip(), value))
        return ""

    call, end = re.escape(marks.call), re.escape(marks.call_end)
    rest = re.sub(f"{call}call:([^{{]+)(.*?)(?:{end}|$)", take, text, flags=re.DOTALL)
    return (rest.strip() if calls else text), tuple(calls)


@dataclass(frozen=True, slots=True)
class _Values:
    """Reads values of a call's arguments. Each method raises if there is none."""

    text: str
    quote: str

    def value(self, at: int) -> tuple[Json, int]:
        """The value that begins at an index, and the index behind it."""
        if self.text.startswith(self.quote, at):
            start = at + len(self.quote)
            end = self.text.index(self.quote, start)
            return self.text[start:end], end + len(self.quote)
        if self.text[at] == "{":
            pairs, end = self._items(at + 1, "}", self._pair)
            return dict(pairs), end
        if self.text[at] == "[":
            return self._items(at + 1, "]", self.value)
        end = at
        while self.text[end] not in ",}]":
            end += 1
        return _bare(self.text[at:end].strip()), end

    def _pair(self, at: int) -> tuple[tuple[str, Json], int]:
        if self.text.startswith(self.quote, at):
            key, at = self.value(at)
        else:
            end = self.text.index(":", at)
            key, at = self.text[at:end].strip(), end
        if self.text[at] != ":":
            raise ValueError("a key without a value")
        value, at = self.value(at + 1)
        return (key, value), at

    def _items(
        self, at: int, end: str, read: Callable[[int], tuple[Json, int]]
    ) -> tuple[list[Json], int]:
        items = []
        while self.text[at] != end:
            item, at = read(at)
            items.append(item)
            if self.text[at] == ",":
                at += 1
            elif self.text[at] != end:
                raise ValueError("no comma between two values")
        return items, at + 1


def _bare(text: str) -> Json:
    if match := _NUMBER.fullmatch(text):
        return float(text) if match[1] or match[2] else int(text)
    return _WORDS.get(text.lower(), text)


def _bodies(text: str) -> Iterator[tuple[int, int, str]]:
    """Where calls can stand: the fenced blocks, or the whole text."""
    for match in _FENCED.finditer(text):
        yield match.start(), match.end(), match[1].strip()
    yield 0, len(text), text.strip()


def _read_json(text: str) -> tuple[ToolCall, ...]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    calls = []
    for entry in found if isinstance(found, list) else [found]:
        if not isinstance(entry, dict):
            return ()
        name, arguments = entry.get("name"), entry.get("parameters", entry.get("arguments", {}))
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return ()
        calls.append(ToolCall(name, arguments))
    return tuple(calls)


def _read_python(text: str) -> tuple[ToolCall, ...]:
    try:
        tree = ast.parse(text, mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else [tree]
        return tuple(map(_python_call, calls))
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        return ()


def _python_call(node: ast.expr) -> ToolCall:
    """Only names and literals; nothing is run."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError("not a call with named arguments")
    arguments = {}
    for word in node.keywords:
        if word.arg is None:
            raise ValueError("** instead of named arguments")
        arguments[word.arg] = ast.literal_eval(word.value)
    json.dumps(arguments)  # a literal such as {1, 2} is not a JSON value
    return ToolCall(node.func.id, arguments)
