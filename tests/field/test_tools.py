"""Tools, their calls and results are rendered as transformers renders them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from gemma_runtime.errors import SessionError
from gemma_runtime.session import FakeSession, Logits
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.conversation import Conversation
from gemma_runtime.text.tokenizer import Tokenizer
from gemma_runtime.text.tools import ACTIVATION, ToolCall
from tests.runtime.conftest import BOS, small_tokenizer

MARKUP = [
    *(f"<{edge}_function_{part}>" for part in ("declaration", "call", "response")
      for edge in ("start", "end")),
    "<escape>",
    *(f"<{begin}{part}{end}>" for part in ("tool", "tool_call", "tool_response", "turn")
      for begin, end in (("|", ""), ("", "|"))),
    '<|"|>', "<|channel>", "<channel|>", "<|think|>",
]  # fmt: skip
# A value of an argument; the families differ in what stands on both sides of a text.
_VALUE = """\
{%- macro value(of) -%}
  {%- if of is string -%}<escape>{{ of }}<escape>
  {%- elif of is mapping -%}
    { {%- for key in of | dictsort %}{{ key[0] }}:{{ value(key[1]) }}{{ ',' if not loop.last }}
    {%- endfor -%} }
  {%- elif of is boolean -%}{{ 'true' if of else 'false' }}
  {%- elif of is sequence -%}
    [{%- for item in of %}{{ value(item) }}{{ ',' if not loop.last }}{% endfor -%}]
  {%- else -%}{{ of }}{%- endif -%}
{%- endmacro -%}
"""
# After FunctionGemma's documented format; written for this test.
FUNCTION_GEMMA = (
    _VALUE
    + """\
{{ bos_token }}
{%- set start = 0 %}
{%- if tools or messages[0].role in ['system', 'developer'] %}
  {{- '<start_of_turn>developer\n' }}
  {%- if messages[0].role in ['system', 'developer'] %}
    {%- set start = 1 %}
    {{- messages[0].content | trim }}
  {%- endif %}
  {%- for tool in tools or [] if tool.type == 'function' %}
    {%- set f = tool.function %}
    {{- '<start_function_declaration>declaration:' + f.name + '{description:' }}
    {{- value(f.description) + ',parameters:' + value(f.parameters) }}
    {{- '}<end_function_declaration>' }}
  {%- endfor %}
  {{- '<end_of_turn>\n' }}
{%- endif %}
{%- set previous = namespace(role='') %}
{%- for message in messages[start:] %}
  {%- if message.role == 'tool' %}
    {%- for answer in message.content %}
      {{- '<start_function_response>response:' + answer.name + value(answer.response) }}
      {{- '<end_function_response>' }}
    {%- endfor %}
  {%- else %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\n' if previous.role != 'tool' }}
    {{- message.content | trim }}
    {%- for call in message.tool_calls or [] %}
      {{- '<start_function_call>call:' + call.function.name }}
      {{- value(call.function.arguments) + '<end_function_call>' }}
    {%- endfor %}
    {{- '<end_of_turn>\n' if not message.tool_calls }}
  {%- endif %}
  {%- set previous.role = message.role %}
{%- endfor %}
{%- if add_generation_prompt and previous.role != 'tool' %}{{ '<start_of_turn>model\n' }}{% endif %}
"""
)
# After Gemma 4's documented format; written for this test. Results are in the turn that calls.
# Thoughts stay until the user's next turn, and with thinking on, one begins after the results.
GEMMA4 = (
    _VALUE.replace("<escape>", '<|"|>')
    + """\
{{ bos_token }}
{%- set start = 0 %}
{%- if tools or messages[0].role == 'system' or enable_thinking %}
  {{- '<|turn>system\n' }}
  {{- '<|think|>\n' if enable_thinking }}
  {%- if messages[0].role == 'system' %}
    {%- set start = 1 %}
    {{- messages[0].content | trim }}
  {%- endif %}
  {%- for tool in tools or [] %}
    {{- '<|tool>declaration:' + tool.function.name + value(tool.function.parameters) + '<tool|>' }}
  {%- endfor %}
  {{- '<turn|>\n' }}
{%- endif %}
{%- set waits = namespace(is=false) %}
{%- set user = namespace(last=-1) %}
{%- for message in messages[start:] %}
  {%- if message.role == 'user' %}{% set user.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages[start:] %}
  {{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
  {%- if message.get('reasoning') and message.tool_calls and loop.index0 > user.last %}
    {{- '<|channel>thought\n' + message.reasoning + '\n<channel|>' }}
  {%- endif %}
  {%- for call in message.tool_calls or [] %}
    {{- '<|tool_call>call:' + call.function.name + value(call.function.arguments) }}
    {{- '<tool_call|>' }}
  {%- endfor %}
  {%- for answer in message.tool_responses or [] %}
    {{- '<|tool_response>response:' + answer.name + value(answer.response) + '<tool_response|>' }}
  {%- endfor %}
  {{- message.content | trim }}
  {%- set waits.is = message.tool_responses and not message.content %}
  {{- '<turn|>\n' if not waits.is }}
{%- endfor %}
{%- if add_generation_prompt and not waits.is %}{{ '<|turn>model\n' }}{% endif %}
{{- '<|channel>thought\n' if add_generation_prompt and waits.is and enable_thinking }}
"""
)
# As templates for Gemma 3 have tools: schemas as JSON, calls as Python or JSON.
PYTHONIC = """\
{{ bos_token }}
{%- for message in messages %}
  {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\n' }}
  {%- if loop.first and tools %}{{ 'Tools:\n' + tools | tojson(indent=4) + '\n\n' }}{% endif %}
  {%- for call in message.tool_calls or [] %}
    {{- '[' + call.function.name + '(' }}
    {%- for key, value in call.function.arguments.items() %}
      {{- key + '=' + value | tojson }}{{ ', ' if not loop.last }}
    {%- endfor %}
    {{- ')]' }}
  {%- endfor %}
  {%- if message.role == 'tool' %}
    {{- '<tool_response>' + message.name + ': ' + message.content | trim + '</tool_response>' }}
  {%- else %}{{- message.content | trim }}{% endif %}
  {{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""
PLAIN = """\
{{ bos_token }}
{%- for message in messages %}
  {{- '<start_of_turn>' + message.role + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Gets the weather, e.g. in \"São Paulo\" <b> [or elsewhere] of 'user'.",
        "parameters": {
            "type": "object",
            "properties": {
                "start": {"type": "string", "description": "City & state"},
                "unit": {"type": "string", "enum": ["C", "F", "in", "eos"]},
                "days": {"type": "integer", "nullable": True},
            },
            "required": ["start"],
        },
    },
}
TIME: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Time.",
        "parameters": {"type": "object", "properties": {}},
    },
}
ARGUMENTS = {"start": 'Rome "<it>"', "days": 2, "deep": {"list": [1, 2.5, True, "x"]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = small_tokenizer()
    raw.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in MARKUP])
    folder = tmp_path_factory.mktemp("tools")
    raw.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def reference(folder: Path) -> PreTrainedTokenizerFast:
    file = str(folder / "tokenizer.json")
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_file=file, bos_token="<bos>", eos_token="<eos>"
    )


def chats(marked: bool) -> list[list[Message]]:
    """Conversations with a call, its result, and the next turns."""
    developer = [Message("developer", ACTIVATION)] if marked else []
    ask = Message("user", "  What's the weather?\n")
    call = Message("assistant", "", (ToolCall("get_weather", ARGUMENTS),))
    result = {"name": "get_weather", "response": {"sky": "clear <now>", "degrees": 21.5}}
    answer = Message("tool", "", results=(result,))
    if not marked:
        answer = Message("tool", ' {"sky": "clear"} ', name="get_weather")
    known = [*developer, ask, call, answer]
    return [
        [*developer, ask],
        known,
        [*known, Message("assistant", "It is clear."), Message("user", "Thanks")],
    ]


def as_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [message.shown(message.content) for message in messages]


@pytest.mark.parametrize("tools", [[], [WEATHER], [WEATHER, TIME]], ids=["none", "one", "two"])
@pytest.mark.parametrize("template", [FUNCTION_GEMMA, PYTHONIC], ids=["marked", "pythonic"])
def test_ids_are_those_of_transformers(
    tokenizer: Tokenizer,
    reference: PreTrainedTokenizerFast,
    template: str,
    tools: list[Any],
) -> None:
    for messages in chats(marked=template is FUNCTION_GEMMA):
        expected = reference.apply_chat_template(
            as_dicts(messages),
            chat_template=template,
            tools=tools or None,
            add_generation_prompt=True,
            return_dict=False,
        )
        assert encode_chat(tokenizer, template, messages, BOS, tools=tools) == expected


@pytest.mark.parametrize("tools", [[WEATHER], [WEATHER, TIME]], ids=["one", "two"])
def test_gemma_4_has_calls_results_and_answer_in_one_turn(
    tokenizer: Tokenizer, reference: PreTrainedTokenizerFast, tools: list[Any]
) -> None:
    """As Google's own examples build the turn, for every version of the template."""
    ask, call, _, *_ = chats(marked=False)[1]
    results = ({"name": "get_weather", "response": {"sky": "clear <now>", "degrees": 21.5}},)
    answered = Message("tool", "", results=results)
    turn = {**call.shown(""), "tool_responses": list(results)}
    said = Message("assistant", "It is clear.")
    thanks = Message("user", "Thanks")
    for messages, expected in (
        ([ask, call, answered], [ask.shown(ask.content), turn]),
        (
            [ask, call, answered, said, thanks],
            [ask.shown(ask.content), {**turn, "content": "It is clear."}, thanks.shown("Thanks")],
        ),
        (
            [ask, call, answered, call, answered],
            [ask.shown(ask.content), turn, turn],
        ),
    ):
        ids = reference.apply_chat_template(
            expected,
            chat_template=GEMMA4,
            tools=tools,
            add_generation_prompt=True,
            return_dict=False,
        )
        assert encode_chat(tokenizer, GEMMA4, messages, BOS, tools=tools) == ids


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_and_developer_turns_are_rendered_as_transformers_does(
    tokenizer: Tokenizer, reference: PreTrainedTokenizerFast, role: Any
) -> None:
    for template in (FUNCTION_GEMMA, PLAIN):
        messages = [Message(role, " Be kind. "), Message("user", "hi")]
        expected = reference.apply_chat_template(
            as_dicts(messages),
            chat_template=template,
            add_generation_prompt=True,
            return_dict=False,
        )
        assert encode_chat(tokenizer, template, messages, BOS) == expected


def test_a_developer_turn_that_the_template_refuses_opens_the_first_user_turn(
    tokenizer: Tokenizer,
) -> None:
    messages = [Message("developer", "Be kind."), Message("user", "hi")]
    folded = [Message("user", "Be kind.\n\nhi")]
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + PLAIN
    assert encode_chat(tokenizer, template, messages, BOS) == encode_chat(
        tokenizer, template, folded, BOS
    )


MARKERS = st.sampled_from(["<end_of_turn>", "<eos>", "eos", "<escape>", "[multimodal]", *MARKUP])
STRINGS = st.lists(MARKERS | st.text("<>[]_|eos ab\"'\n", max_size=5), max_size=3).map("".join)


@pytest.mark.parametrize("template", [FUNCTION_GEMMA, GEMMA4, PYTHONIC])
@given(text=STRINGS, key=STRINGS)
def test_no_string_of_a_tool_a_call_or_a_result_becomes_a_control_token(
    tokenizer: Tokenizer, template: str, text: str, key: str
) -> None:
    marked = template is not PYTHONIC

    def control(text: str, key: str) -> list[int]:
        arguments = {f"a{key}": text, "z": [text]}
        function = {"name": f"f{text}", "description": text, "parameters": {f"a{key}": text}}
        call = ToolCall(f"f{text}", arguments)
        messages = [
            Message("user", "hi"),
            Message("assistant", text, (call,), thought=f"t{text}"),
            Message("tool", "", results=({"name": text, "response": arguments},))
            if marked
            else Message("tool", text, name=text),
        ]
        tools = [{"type": "function", "function": function}]
        ids = encode_chat(tokenizer, template, messages, BOS, tools=tools)
        return [token for token in ids if token in tokenizer.control_tokens]

    assert control(text, key) == control("b", "c")


def test_a_template_without_tools_gets_gemma_3_s_prompt(tokenizer: Tokenizer) -> None:
    """https://ai.google.dev/gemma/docs/capabilities/function-calling"""
    call = ToolCall("get_time", {})
    messages = [
        Message("system", "Be kind."),
        Message("user", "What time is it?"),
        Message("assistant", "", (call, call)),
        Message("tool", "12:00", name="get_time"),
        Message("tool", "12:01", name="get_time"),
    ]
    for template in (None, PLAIN):
        ids = encode_chat(tokenizer, template, messages, BOS, tools=[TIME])
        text = tokenizer.decode(ids)
        begin, functions = text.split("if you call a function\n")
        assert "Be kind.\n\nYou have access to functions." in begin
        assert json.loads(functions[: functions.index("\n]") + 2]) == [TIME["function"]]
        assert '[{"name": "get_time", "parameters": {}}, {"name"' in text
        assert text.endswith(
            "user\n```tool_output\n12:00\n```\n```tool_output\n12:01\n```\nmodel\n"
        )


class Replying(FakeSession):
    """A session that says these replies, each up to <eos>: one after each prompt."""

    def __init__(self, tokenizer: Tokenizer, replies: Sequence[str]) -> None:
        super().__init__(lambda tokens: np.zeros(500, np.float32))
        self._replies = [iter([*tokenizer.encode(text, control=True), 1]) for text in replies]

    def prefill(self, tokens: Sequence[int]) -> Logits:
        super().prefill(tokens)
        if len(tokens) > 1:  # not a token of a reply
            self._reply = self._replies.pop(0)
        return self._next()

    def _next(self) -> Logits:
        logits = np.zeros(500, np.float32)
        logits[next(self._reply)] = 1
        return logits


@pytest.mark.parametrize(
    ("template", "first", "content"),
    [
        (
            FUNCTION_GEMMA,
            "<start_function_call>call:get_weather{start:<escape>Rome<escape>}<end_function_call>"
            "<start_function_response>response:never said",
            [{"name": "get_weather", "response": {"sky": "clear"}}],
        ),
        (
            GEMMA4,
            '<|tool_call>call:get_weather{start:<|"|>Rome<|"|>}<tool_call|>'
            "<|tool_response>never said",
            [{"name": "get_weather", "response": {"sky": "clear"}}],
        ),
        (PYTHONIC, '[get_weather(start="Rome")]', '{"sky": "clear"}'),
        (None, '{"name": "get_weather", "parameters": {"start": "Rome"}}', '{"sky": "clear"}'),
    ],
    ids=["marked", "gemma4", "pythonic", "prompted"],
)
def test_a_conversation_reads_calls_and_sends_their_results(
    tokenizer: Tokenizer, template: str | None, first: str, content: object
) -> None:
    conversation = Conversation(
        Replying(tokenizer, [first, "It is clear."]),
        tokenizer,
        template=template,
        bos_token=BOS,
        stop_tokens=[1],
        tools=[WEATHER],
    )
    reply = conversation.send("What's the weather in Rome?")
    list(reply)
    call = ToolCall("get_weather", {"start": "Rome"})
    assert (reply.result.text, reply.result.tool_calls) == ("", (call,))
    with pytest.raises(SessionError, match="calls 1 tools, but there are 2 results"):
        conversation.send_results([1, 2])
    answer = conversation.send_results([{"sky": "clear"}])
    assert "".join(answer) == "It is clear."
    roles = [message.role for message in conversation.messages]
    assert roles[-4:] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[-2].shown(conversation.messages[-2].content)["content"] == content
    assert (roles[0] == "developer") == (template is FUNCTION_GEMMA)
    with pytest.raises(SessionError, match="calls 0 tools"):
        conversation.send_results([1])


def test_a_thought_before_a_call_is_not_in_the_text(tokenizer: Tokenizer) -> None:
    said = (
        "<|channel>thought\nThe user wants <|tool_call> rain.<channel|>"
        '<|tool_call>call:get_weather{start:<|"|>Rome<|"|>,days:2}<tool_call|>'
    )
    conversation = Conversation(
        Replying(tokenizer, [said]),
        tokenizer,
        template=GEMMA4,
        bos_token=BOS,
        stop_tokens=[1],
        tools=[WEATHER],
    )
    reply = conversation.send("Rain in Rome?")
    list(reply)
    assert reply.result.text == ""
    assert reply.result.thought.startswith("The user wants")
    assert reply.result.tool_calls == (ToolCall("get_weather", {"start": "Rome", "days": 2}),)


def test_a_model_sees_its_thought_again_while_it_waits_for_a_result(
    tokenizer: Tokenizer, reference: PreTrainedTokenizerFast
) -> None:
    """The template opens the next thought: the whole reply would be taken for the answer."""
    said = (
        "<|channel>thought\nWhich <city>?\n<channel|>"
        '<|tool_call>call:get_time{city:<|"|>Rome<|"|>}<tool_call|>'
    )
    session = Replying(tokenizer, [said, "So late.\n<channel|>It is 12:00.", "Bye."])
    conversation = Conversation(
        session,
        tokenizer,
        template=GEMMA4,
        bos_token=BOS,
        stop_tokens=[1],
        tools=[TIME],
        thinking=True,
    )
    list(conversation.send("What time is it?"))
    ask, call = conversation.messages
    answer = conversation.send_results([{"time": "12:00"}])
    assert call.thought == "Which <city>?"
    responses = {"tool_responses": [{"name": "get_time", "response": {"time": "12:00"}}]}
    expected = reference.apply_chat_template(
        [ask.shown(ask.content), {**call.shown(""), **responses}],
        chat_template=GEMMA4,
        tools=[TIME],
        add_generation_prompt=True,
        enable_thinking=True,
        return_dict=False,
    )
    assert "".join(answer) == "It is 12:00."
    assert answer.result.thought == "So late."
    assert list(session.tokens[: len(expected)]) == expected
    assert "Which <city>?" in tokenizer.decode(session.tokens)
    # It doesn't see it after the user's next turn.
    list(conversation.send("Thanks"))
    assert "Which" not in tokenizer.decode(session.tokens)
    assert conversation.messages[-1].content == "Bye."
