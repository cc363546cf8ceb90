"""Calls of tools are read from replies in FunctionGemma's and in Gemma 3's formats."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_runtime.errors import TokenizerError
from gemma_runtime.text.tools import ToolCall, call_text, check_tools, find_calls, read_tools

CALL, END, ESCAPE = "<start_function_call>", "<end_function_call>", "<escape>"
PLAIN = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=9)
NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | PLAIN,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(NAMES, values, max_size=3),
    max_leaves=6,
)


def marked(value: Any) -> str:
    """A value as FunctionGemma's template writes it."""
    if isinstance(value, str):
        return ESCAPE + value + ESCAPE
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{marked(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(marked, value)) + "]"
    return json.dumps(value)


@given(calls=st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1))
def test_marked_calls_are_read_with_all_values(calls: list[tuple[str, dict[str, Any]]]) -> None:
    text = "".join(f"{CALL}call:{name}{marked(values)}{END}" for name, values in calls)
    assert find_calls(text, ()) == ("", tuple(ToolCall(*call) for call in calls))


def test_googles_examples_are_read() -> None:
    """From FunctionGemma's documentation, with text around it."""
    text = (
        "Let me look.<start_function_call>call:get_current_temperature{location:<escape>Paris"
        "<escape>,unit:<escape>celsius<escape>}<end_function_call>"
    )
    arguments = {"location": "Paris", "unit": "celsius"}
    expected = ("Let me look.", (ToolCall("get_current_temperature", arguments),))
    assert find_calls(text, ()) == expected
    assert find_calls(text.removesuffix(END), ()) == expected  # the end token stops a reply


@pytest.mark.parametrize(
    "text",
    [
        "{CALL}",
        "{CALL}call:f",
        "{CALL}call:f{{x:1{END}",
        "{CALL}call:f{{x{END}",
        "{CALL}call:f{{x:{ESCAPE}1}}{END}",
        "{CALL}call:f{{x:1}}}}{END}",
        "{CALL}call:f[1]{END}",
        "{CALL}call:f{{x:[1 {{}}{END}",
        "{CALL}call:f" + "{{a:" * 100_000,
        "{CALL}call:f{{a:" + "[" * 100_000,
    ],
)
def test_a_broken_call_stays_text(text: str) -> None:
    text = text.format(CALL=CALL, END=END, ESCAPE=ESCAPE)
    assert find_calls(text, ()) == (text, ())


CALLED = [ToolCall("f", {"a": "x y", "b": [1, 2.5]}), ToolCall("g", {})]


@pytest.mark.parametrize(
    ("text", "rest", "count"),
    [
        ('{"name": "f", "parameters": {"a": "x y", "b": [1, 2.5]}}', "", 1),
        ('```json\n{"name": "f", "arguments": {"a": "x y", "b": [1, 2.5]}}\n```', "", 1),
        ('Yes.\n```tool_code\nf(a="x y", b=[1, 2.5])\n```', "Yes.", 1),
        ('[f(a="x y", b=[1, 2.5]), g()]', "", 2),
        (call_text(CALLED[:1]), "", 1),
        (call_text(CALLED), "", 2),
    ],
)
def test_gemma_3_s_calls_are_read(text: str, rest: str, count: int) -> None:
    assert find_calls(text, {"f", "g"}) == (rest, tuple(CALLED[:count]))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "f",
        "f(1)",
        "h(a=1)",
        "f(a=b)",
        "f(**{})",
        "f(a={1})",
        "x.f()",
        "[f(), print()]",
        "Call f(a=1) now.",
        '{"name": "h", "parameters": {}}',
        '{"name": "f", "parameters": 3}',
        '["f"]',
        "[" * 100_000,
        "```json\n{}\n```",
    ],
)
def test_other_text_is_no_call(text: str) -> None:
    assert find_calls(text, {"f", "g"}) == (text, ())


def test_without_tools_json_is_text() -> None:
    assert find_calls('{"name": "f", "parameters": {}}', ())[1] == ()


@given(text=st.text("{}[](),:=\"'fgab1<>`\n" + ESCAPE, max_size=60))
def test_any_text_is_read_without_an_error(text: str) -> None:
    find_calls(CALL + "call:f{" + text, {"f"})
    find_calls(text, {"f", "g"})


def test_a_bare_schema_is_wrapped(tmp_path: Path) -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    whole = {"type": "function", "function": function}
    (tmp_path / "tools.json").write_text(json.dumps([function, whole]))
    assert read_tools(tmp_path / "tools.json") == [whole, whole]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "tools.json is not JSON"),
        ('{"name": "f"}', "tools.json: expected a list of tools"),
        ('[{"name": "f"}, {"function": {}}]', "tool 2 has no name"),
        ("[3]", "tool 1 has no name"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "tools.json").write_text(content)
    with pytest.raises(TokenizerError, match=match):
        read_tools(tmp_path / "tools.json")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="can't read"):
        read_tools(tmp_path / "nothing.json")
    assert check_tools([]) == []
