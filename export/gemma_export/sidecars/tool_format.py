"""Finds how phones can give tools to a model, and compares what they write with the template."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from gemma_export.sidecars.chat_texts import ChatFormat, ToolFormat, ToolMarks
from gemma_export.sidecars.marked_tools import MarkedTools
from gemma_runtime.errors import TokenizerError
from gemma_runtime.text.chat import Message, in_model_turns
from gemma_runtime.text.frame import ChatFrame
from gemma_runtime.text.tools import GEMMA4, PROMPT, Json, Schema, ToolCall, check_tools

_ASK, _SAID, _THANKS = (f"{index}{'6' * 38}{index}" for index in range(3))
_RESPONSE_END = "<tool_response|>"


def tool_format(frame: ChatFrame, chat: ChatFormat) -> ToolFormat | None:
    """How tools get into the prompts of a template; None if phones can't write them as it does."""
    if frame.leaves_out_tools():
        return ToolFormat(PROMPT, None)
    if GEMMA4.call not in frame.template:
        return None
    try:
        marks = _marks_of(frame)
        if not all(_is_same(frame, chat, marks, *probe) for probe in _probes()):
            return None
    except TokenizerError:
        return None
    return ToolFormat(None, marks)


def _marks_of(frame: ChatFrame) -> ToolMarks:
    ask = Message("user", _ASK)
    call = Message("assistant", "", (ToolCall("f", {}),))
    said = replace(call, content=_SAID)
    results = Message("tool", "", results=({"name": "f", "response": {}},))
    unanswered = _render(frame, [ask, call, Message("user", _THANKS)]).partition(_THANKS)[0]
    return ToolMarks(
        quote=GEMMA4.quote,
        declaration=("<|tool>declaration:", "<tool|>"),
        call=(f"{GEMMA4.call}call:", GEMMA4.call_end),
        response=(f"{GEMMA4.response}response:", _RESPONSE_END),
        thought=("<|channel>thought\n", "\n<channel|>"),
        unanswered=unanswered.rpartition(GEMMA4.call_end)[2],
        reply=_render(frame, [ask, call, results]).rpartition(_RESPONSE_END)[2],
        reply_after_text=_render(frame, [ask, said, results]).rpartition(_SAID)[2],
        waits=GEMMA4.response,
    )


def _is_same(
    frame: ChatFrame,
    chat: ChatFormat,
    marks: ToolMarks,
    tools: Sequence[Schema],
    turns: Sequence[Message],
) -> bool:
    expected = _render(replace(frame, tools=list(tools) or None), turns)
    return MarkedTools(marks).render(chat, tools, in_model_turns(turns)) == expected


def _render(frame: ChatFrame, turns: Sequence[Message]) -> str:
    return frame.render([turn.shown(turn.content) for turn in in_model_turns(turns)])


def _probes() -> Iterator[tuple[Sequence[Schema], list[Message]]]:
    """Tools and conversations. Few without tools, since a template is read anew for each."""
    chats = list(_chats())
    yield from ((_TOOLS, turns) for turns in chats)
    yield _TOOLS[1:2], chats[0]
    yield from (([], turns) for turns in chats if turns[-1].role == "tool" and len(turns) > 5)


def _chats() -> Iterator[list[Message]]:
    """Conversations with each kind of turn after each other."""
    ask, thanks = Message("user", f" {_ASK}\n"), Message("user", _THANKS)
    said = Message("assistant", f"\n{_SAID} ")
    call = Message("assistant", "", (ToolCall("get_weather", _VALUES),), thought=f"is {_SAID}")
    calls = replace(call, content=f" {_SAID}", tool_calls=(*call.tool_calls, ToolCall("a", {})))
    one, both = _results(_VALUES), _results([1, "x"], "text")
    system = Message("system", f" {_SAID}\n")
    for begin in ([], [system]):
        yield [*begin, ask]
        yield [*begin, ask, said, thanks]
        yield [*begin, ask, call, one]
        yield [*begin, ask, calls, both]
        yield [*begin, ask, call, one, said, thanks]
        yield [*begin, ask, calls, both, said, thanks, call, one]
        yield [*begin, ask, call, one, calls, both, said, thanks]
        yield [*begin, ask, call, one, calls, both, call, one]
        yield [*begin, ask, call, thanks]
        yield [*begin, ask, calls, thanks, said, ask]
        yield [*begin, ask, call, one, replace(said, content=""), thanks]
    odd: list[Json] = [None, True, 2, 2.5, "", [], {}, [None, {"B": [], "a": {}}]]
    for result in odd:
        yield [ask, call, _results(result)]


def _results(*results: Json) -> Message:
    return Message(
        "tool", "", results=tuple({"name": "get_weather", "response": one} for one in results)
    )


_VALUES: dict[str, Json] = {
    "city": "São \"Paulo\" {'a'}: [b], c",
    "Empty": "",
    "days": [0, -2, 10**20, 2.5, 1e-7, 1e22, -0.0],
    "deep": {"Z": None, "y": True, "x": [{}, [], {"k": False}, "日本 😀\n"]},
    "äther": 1,
}
_CITY = {"type": "string", "description": "City, e.g. \"São Paulo\" & 'x' <b>"}
_TOOLS = check_tools(
    [
        {
            "name": "get_weather",
            "description": "Gets the weather, e.g. in \"São Paulo\" <b> [or] of 'user' 日本.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": _CITY,
                    "Unit": {"type": "string", "enum": ["C", "F", 'q"'], "nullable": True},
                    "days": {"type": "integer", "minimum": 1, "enum": [1, 2], "description": ""},
                    "exact": {"type": "boolean", "nullable": False},
                    "tags": {"type": "array", "items": {"type": "string", "enum": ["a", 1.5]}},
                    "bare": {"type": "array"},
                    "places": {
                        "type": "array",
                        "description": "Where",
                        "nullable": True,
                        "items": {
                            "type": "object",
                            "description": "A place",
                            "properties": {"city": _CITY, "at": {"type": "number"}},
                            "required": ["city", "at"],
                            "default": {"B": None, "a": [True]},
                            "none": None,
                        },
                    },
                    "options": {
                        "type": "object",
                        "description": "More",
                        "properties": {"type": {"type": "string"}, "in": {"type": "object"}},
                        "required": ["type"],
                    },
                    "open": {"type": "object", "additionalProperties": False, "x": _CITY},
                    "any": {"anyOf": [_CITY, {"type": "null"}]},
                    "yes": True,
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
        {"name": "a", "description": "Nothing in, nothing out.", "parameters": {}},
        {"name": "b", "parameters": {"type": "object", "properties": {}}},
        {
            "name": "c",
            "description": "",
            "parameters": {"properties": {"x": {"type": "Integer"}}, "required": []},
            "response": {"type": "object", "description": 'It is "so"'},
        },
    ]
)
