"""How phones give tools to a model, compared with the templates that write them."""

import json

import pytest

from gemma_export.sidecars.chat_format import chat_format
from gemma_export.sidecars.chat_texts import ChatFormat
from gemma_export.sidecars.tool_format import tool_format
from gemma_runtime.text.frame import ChatFrame
from gemma_runtime.text.tools import PROMPT
from tests.data import gemma4_vectors, tool_vectors
from tests.field.test_tools import FUNCTION_GEMMA, GEMMA4, PYTHONIC


def test_the_committed_vectors_are_those_of_the_runtime() -> None:
    committed = json.loads(tool_vectors.VECTORS.read_text())
    assert json.loads(json.dumps(tool_vectors.vectors())) == committed


@pytest.mark.parametrize("template", [None, tool_vectors.GEMMA3])
def test_templates_that_leave_tools_out_get_the_documented_prompt(template: str | None) -> None:
    tools = chat_format(template, "<bos>", "<eos>").tools
    assert tools is not None
    assert (tools.prompt, tools.marks) == (PROMPT, None)


@pytest.fixture(scope="module")
def gemma4() -> ChatFormat:
    return chat_format(gemma4_vectors.TEMPLATE, "<bos>", "<eos>")


def test_gemma_4_s_tools_are_written_by_its_tokens(gemma4: ChatFormat) -> None:
    assert gemma4.tools is not None
    assert gemma4.thinking is not None
    assert gemma4.thinking.tools is not None
    marks, thinks = gemma4.tools.marks, gemma4.thinking.tools.marks
    assert marks is not None
    assert thinks is not None
    assert (gemma4.tools.prompt, marks.quote, marks.waits) == (None, '<|"|>', "<|tool_response>")
    assert marks.unanswered == "<|tool_response><|turn>user\n"
    assert (marks.reply, thinks.reply) == ("", "<|channel>thought\n")
    assert marks.reply_after_text == "<turn|>\n"
    assert marks.call == ("<|tool_call>call:", "<tool_call|>")


@pytest.mark.parametrize(
    ("written", "otherwise"),
    [
        ("in of | dictsort -%}", "in of.items() -%}"),  # the order of arguments
        ("{{- 'null' -}}", "{{- of -}}"),  # as the first of Gemma 4's templates: None
        ("'nullable:true,' if schema['nullable']", "''"),
        ("one | upper", "one"),  # the types of a list's items
        ("if state.role != turn.role", ""),  # a model's turn that goes on
        ("loop.index0 > state.asked", "true"),  # thoughts before the user's last turn
        ("'<|tool>' +", "'<|tool> ' +"),
        ("schema['enum']", "false"),
        ("'description:' + text(of.response", "'about:' + text(of.response"),
    ],
)
def test_tools_that_a_template_writes_otherwise_are_refused_on_phones(
    gemma4: ChatFormat, written: str, otherwise: str
) -> None:
    assert written in gemma4_vectors.TEMPLATE
    template = gemma4_vectors.TEMPLATE.replace(written, otherwise)
    assert tool_format(ChatFrame(template, "<bos>", "<eos>"), gemma4) is None


@pytest.mark.parametrize("template", [FUNCTION_GEMMA, PYTHONIC, GEMMA4])
def test_templates_with_another_syntax_are_refused_on_phones(
    gemma4: ChatFormat, template: str
) -> None:
    """The third one's declarations have the schema as it is."""
    assert tool_format(ChatFrame(template, "<bos>", "<eos>"), gemma4) is None
