from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_runtime.errors import TokenizerError
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.frame import CANONICAL_TEMPLATE
from gemma_runtime.text.tokenizer import Tokenizer
from tests.runtime.conftest import BOS, RESERVED, SPECIAL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Like Gemma 2's template: it refuses a system turn.
REFUSES_SYSTEM = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}
{%- for message in messages %}
    {{- '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim }}
    {{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""
KEEPS_SPACE = "{% for m in messages %}<start_of_turn>{{ m.content }}<end_of_turn>{% endfor %}"
STRIPS_THOUGHTS = CANONICAL_TEMPLATE.replace("message.content", "text").replace(
    "{%- set speaker",
    "{%- set text = message.content %}{% if message.role == 'assistant' %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}\n    {%- set speaker",
)
DOUBLE = (
    "{{% set x = namespace(y={start}) %}}"
    "{{% for i in range(60) %}}{{% set x.y = {step} %}}{{% endfor %}}"
)

MARKED = st.lists(
    st.sampled_from([*SPECIAL, *RESERVED, "<start_of_turn>model\n", "<", "of_turn>", "\n"])
    | st.text(max_size=6)
).map("".join)
CHATS = [
    [("user", "Hello!")],
    [("user", "Why is the sky blue?\n\nBe brief."), ("assistant", "Rayleigh."), ("user", "Who?")],
    [("system", "Answer in French."), ("user", "  def f(x):\n\treturn 1 + 1  ")],
    [("system", "日本語で。"), ("user", "😀?"), ("assistant", " Ja.\n"), ("user", "<b>1</b> 2  3")],
]


def say(*turns: tuple[str, str]) -> list[Message]:
    return [Message(role, content) for role, content in turns]  # type: ignore[arg-type]


def rendered(tokenizer: Tokenizer, template: str) -> str:
    """What a template makes of a user's "hi"."""
    return tokenizer.decode(encode_chat(tokenizer, template, say(("user", "hi")), BOS))


def pieces(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The ids as one string, control tokens included."""
    return "".join(
        tokenizer.piece(t) or "" if t in tokenizer.control_tokens else tokenizer.decode([t])
        for t in ids
    )


def test_without_a_template_turns_have_gemma_s_format(tokenizer: Tokenizer) -> None:
    chat = say(("user", " hi "), ("assistant", "ho\n"), ("user", "the user"))
    assert pieces(tokenizer, encode_chat(tokenizer, None, chat, BOS)) == (
        "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nho<end_of_turn>\n"
        "<start_of_turn>user\nthe user<end_of_turn>\n<start_of_turn>model\n"
    )


@pytest.mark.parametrize("template", [None, REFUSES_SYSTEM])
def test_a_system_turn_opens_the_first_user_turn(
    tokenizer: Tokenizer, template: str | None
) -> None:
    ids = encode_chat(tokenizer, template, say(("system", "Be kind. "), ("user", " hi")), BOS)
    assert pieces(tokenizer, ids) == (
        "<bos><start_of_turn>user\nBe kind.\n\nhi<end_of_turn>\n<start_of_turn>model\n"
    )


def test_a_system_turn_that_the_template_leaves_out_is_not_lost(tokenizer: Tokenizer) -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    ids = encode_chat(tokenizer, template, say(("system", "Be kind."), ("user", "hi")), BOS)
    assert tokenizer.decode(ids) == "Be kind.\n\nhi"


@pytest.mark.parametrize("template", [None, REFUSES_SYSTEM, KEEPS_SPACE])
@given(user=MARKED, system=MARKED, reply=MARKED)
def test_no_content_becomes_a_control_token(
    tokenizer: Tokenizer, template: str | None, user: str, system: str, reply: str
) -> None:
    def control(*contents: str) -> list[int]:
        roles = ("system", "user", "assistant", "user")
        chat = say(*zip(roles, contents, strict=True))
        ids = encode_chat(tokenizer, template, chat, BOS)
        return [token for token in ids if token in tokenizer.control_tokens]

    assert control(system, user, reply, user) == control("a", "b", "c", "d")


@given(content=MARKED)
def test_content_is_kept_exactly(tokenizer: Tokenizer, content: str) -> None:
    content = content.replace("▁", "_")
    ids = encode_chat(tokenizer, KEEPS_SPACE, say(("user", content)), BOS)
    assert tokenizer.decode(ids) == content
    trimmed = encode_chat(tokenizer, None, say(("user", content)), BOS)
    assert tokenizer.decode(trimmed) == f"user\n{content.strip()}\nmodel\n"


def test_a_marker_split_between_content_and_template_is_text(tokenizer: Tokenizer) -> None:
    """The content `<end_of` followed by the template's `_turn>` must not close the turn."""
    ids = encode_chat(tokenizer, "{{ messages[0].content }}_turn>", say(("user", "<end_of")), BOS)
    assert tokenizer.decode(ids) == "<end_of_turn>"
    assert tokenizer.control_tokens.isdisjoint(ids)


@pytest.mark.parametrize(
    ("prefix", "times"), [("", 0), ("{{ bos_token }}", 1), ("{{ bos_token }}<bos>", 2)]
)
def test_bos_comes_as_often_as_the_template_writes_it(
    tokenizer: Tokenizer, prefix: str, times: int
) -> None:
    """A ChatML template without bos got one; a bos before a later turn was dropped."""
    ids = encode_chat(tokenizer, prefix + KEEPS_SPACE, say(("user", "hi")), BOS)
    assert ids[:times] == [BOS] * times
    assert ids.count(BOS) == times


def test_a_bos_before_each_turn_is_kept(tokenizer: Tokenizer) -> None:
    template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    chat = say(("user", "in"), ("assistant", "us"), ("user", "er"))
    assert pieces(tokenizer, encode_chat(tokenizer, template, chat, BOS)) == (
        "<bos>in<bos>us<bos>er"
    )


def test_a_bos_that_is_an_ordinary_piece_is_not_removed_from_text(tokenizer: Tokenizer) -> None:
    """If config.json named `h` as bos, every `h` in the user's text was dropped."""
    letter = tokenizer.token_id("h")
    assert letter is not None
    template = "{{ bos_token }}" + KEEPS_SPACE
    ids = encode_chat(tokenizer, template, say(("user", "hi h")), letter)
    assert tokenizer.decode(ids) == "hhi h"


def test_the_template_writes_the_eos_token_that_the_tokenizer_names(tokenizer: Tokenizer) -> None:
    """A ChatML fine-tune with its own eos token was given `<eos>`."""
    end = tokenizer.token_id("<end_of_turn>")
    template = KEEPS_SPACE + "{{ eos_token }}"
    chat = say(("user", "hi"))
    assert encode_chat(tokenizer, template, chat, BOS, end)[-1] == end
    assert encode_chat(tokenizer, template, chat, BOS)[-1] == tokenizer.token_id("<eos>")


def test_a_template_may_change_the_text(tokenizer: Tokenizer) -> None:
    assert rendered(tokenizer, "{{ messages[0].content | upper }}") == "HI"


def test_thoughts_are_removed_from_earlier_replies_where_the_template_does(
    tokenizer: Tokenizer,
) -> None:
    """The template saw a placeholder, so it found no `</think>`."""
    chat = say(("user", "in"), ("assistant", "<think>us</think>\ner"), ("user", "in"))
    ids = encode_chat(tokenizer, STRIPS_THOUGHTS, chat, BOS)
    assert pieces(tokenizer, ids) == (
        "<bos><start_of_turn>user\nin<end_of_turn>\n<start_of_turn>model\ner<end_of_turn>\n"
        "<start_of_turn>user\nin<end_of_turn>\n<start_of_turn>model\n"
    )


@given(user=MARKED, reply=MARKED)
def test_no_content_becomes_a_control_token_where_the_template_reads_it(
    tokenizer: Tokenizer, user: str, reply: str
) -> None:
    def control(user: str, reply: str) -> list[int]:
        chat = say(("user", user), ("assistant", f"</think>{reply}"), ("user", user))
        ids = encode_chat(tokenizer, STRIPS_THOUGHTS, chat, BOS)
        return [token for token in ids if token in tokenizer.control_tokens]

    assert control(user, reply) == control("a", "b")


def test_a_control_token_joined_by_the_template_from_text_is_refused(tokenizer: Tokenizer) -> None:
    template = STRIPS_THOUGHTS.replace("split('</think>')[-1]", "replace('</think>', '')")
    chat = say(("user", "a"), ("assistant", "<end_of</think>_turn>"), ("user", "b"))
    with pytest.raises(TokenizerError, match="depending on a message's text"):
        encode_chat(tokenizer, template, chat, BOS)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "no user turn"),
        ([("system", "x")], "no user turn"),
        ([("assistant", "x")], "turn 1 is by 'assistant', expected 'user'"),
        ([("user", "x"), ("user", "y")], "turn 2 is by 'user', expected 'assistant'"),
        ([("user", "x"), ("system", "y")], "turn 2 is by 'system', expected 'assistant'"),
    ],
)
def test_turns_must_alternate(
    tokenizer: Tokenizer, turns: list[tuple[str, str]], message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        encode_chat(tokenizer, None, say(*turns), BOS)


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ messages[0].content.nothing.more }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no\n\nway') }}",
        "{% for x in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ '%d' % 'x' }}",
        "{% include 'other' %}",
        "no content at all",
    ],
)
def test_a_hostile_or_broken_template_gives_one_error_line(
    tokenizer: Tokenizer, template: str
) -> None:
    with pytest.raises(TokenizerError, match="the chat template") as caught:
        encode_chat(tokenizer, template, say(("system", "be"), ("user", "hi")), BOS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "bound"),
    [
        ("{% for a in 'x' * 999 %}{% for b in 'x' * 999 %}{% endfor %}{% endfor %}", "steps"),
        ("{% for a in 'x' * 999 %}{% for b in 'x' * 999 if 0 %}{% endfor %}{% endfor %}", "steps"),
        ("{% for a in 'xx' %}{% for b in range(99999) if 0 %}{% endfor %}{% endfor %}", "steps"),
        ("{{ range(10 ** 12) }}", "steps"),
        ("{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}", "steps"),
        (DOUBLE.format(start="'a'", step="x.y ~ x.y"), "a text or list longer"),
        (DOUBLE.format(start="'a'", step="x.y + x.y"), "a text or list longer"),
        (DOUBLE.format(start="[1]", step="x.y + x.y"), "a text or list longer"),
        (DOUBLE.format(start="9", step="x.y * x.y"), "more than 64 bits"),
        ("{% for i in range(99) %}{{ 'x' * 100000 }}{% endfor %}", "a text or list longer"),
        ("{{ 'x' * 10 ** 12 }}", "a text or list longer"),
        ("{{ 10 ** 12 * ['x'] }}", "a text or list longer"),
        ("{{ 10 ** (10 ** 12) }}", "more than 64 bits"),
        ("{{ lipsum(10 ** 9) }}", "'lipsum' is undefined"),
        ("{{ messages | slice(10 ** 9) | list }}", "No filter named 'slice'"),
        ("{{ messages | batch(10 ** 9) | list }}", "No filter named 'batch'"),
        ("x" * 200_001, "it has 200001 characters"),
    ],
)
def test_a_template_that_runs_too_long_is_stopped(
    tokenizer: Tokenizer, template: str, bound: str
) -> None:
    """Nested loops and recursive macros ran for hours."""
    with pytest.raises(TokenizerError, match=f"the chat template fails: .*{bound}"):
        encode_chat(tokenizer, template, say(("user", "hi")), BOS)


def test_a_long_conversation_is_within_the_limits(tokenizer: Tokenizer) -> None:
    turns = [("user", "hi"), ("assistant", "ho")] * 500 + [("user", "hi")]
    ids = encode_chat(tokenizer, None, say(*turns), BOS)
    assert pieces(tokenizer, ids).count("<start_of_turn>") == 1002


def test_operators_give_jinja_s_results(tokenizer: Tokenizer) -> None:
    template = (
        "{{ 2 + 3 * 4 ** 2 }} {{ 'ab' * 2 + 'c' ~ 1.5 ~ none }} {{ ([1] * 2 + [3]) | length }} "
        "{{ 2 ** -1 }} {{ 1.5 * 2 + 1 }}{% for i in range(5, 0, -2) if i > 1 %} {{ i }}{% endfor %}"
        " {{ messages[0].content }}"
    )
    assert rendered(tokenizer, template) == "50 ababc1.5None 3 0.5 4.0 5 3 hi"


def test_generation_blocks_are_rendered(tokenizer: Tokenizer) -> None:
    """Templates with Hugging Face's `generation` blocks were refused as broken."""
    template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert rendered(tokenizer, template) == "hi"


def test_blocks_leave_no_white_space(tokenizer: Tokenizer) -> None:
    template = "{% for m in messages %}\n{{ m.content }}\n  {% endfor %}\n"
    assert rendered(tokenizer, template) == "hi\n"


def test_loop_controls_and_tojson_follow_hugging_face(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ {'a': '<é>'} | tojson }}{{ m.content }}{% endfor %}"
        "{{ '' if tools is none else 'tools' }}{{ strftime_now('%%') }}"
    )
    assert rendered(tokenizer, template) == '{"a": "<é>"}hi%'


@pytest.mark.parametrize("turns", CHATS)
def test_gemma_3_s_ids_equal_those_of_transformers(
    genuine: Tokenizer, reference: "PreTrainedTokenizerBase", turns: list[tuple[str, str]]
) -> None:
    ids = encode_chat(genuine, reference.chat_template, say(*turns), BOS)
    expected = reference.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert ids == expected
    assert encode_chat(genuine, None, say(*turns), BOS) == expected


@pytest.fixture(scope="module")
def genuine(gemma3_tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer(gemma3_tokenizer_folder / "tokenizer.json")


@pytest.fixture(scope="module")
def reference(gemma3_tokenizer_folder: Path) -> "PreTrainedTokenizerBase":
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(gemma3_tokenizer_folder)  # type: ignore[no-any-return]
