from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_runtime.errors import TokenizerError
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.opening import Opening, read_examples, read_text
from gemma_runtime.text.shared_prefix import common_length
from gemma_runtime.text.tokenizer import Tokenizer
from tests.runtime.conftest import BOS
from tests.runtime.manifests import make_manifest

EXAMPLES = (Message("user", "the user"), Message("assistant", "in us"))
TOOL = {"type": "function", "function": {"name": "ring", "parameters": {"type": "object"}}}
OPENINGS = (
    Opening(text="the us"),
    Opening(text="in the\n"),
    Opening(system="the user"),
    Opening(system="er", examples=EXAMPLES),
    Opening(examples=EXAMPLES),
    Opening(tools=(TOOL,)),
)


@given(opening=st.sampled_from(OPENINGS), content=st.text(min_size=1).filter(str.strip))
def test_prompts_begin_with_the_prefix_unless_their_text_joins_it(
    tokenizer: Tokenizer, opening: Opening, content: str
) -> None:
    """Joins at the border are known for the beginnings that are tried, and told for others."""
    manifest = make_manifest()
    prefix = opening.prefix(tokenizer, manifest)
    tokens = opening.encode(tokenizer, manifest, content)
    assert prefix[0] == BOS
    assert tokens[: len(prefix) - 1] == prefix[:-1]


@pytest.mark.parametrize("opening", OPENINGS)
def test_the_prefix_is_all_that_two_prompts_share_but_a_last_token(
    tokenizer: Tokenizer, opening: Opening
) -> None:
    manifest = make_manifest()
    prefix = opening.prefix(tokenizer, manifest)
    shared = common_length(*(opening.encode(tokenizer, manifest, content) for content in "xy"))
    assert len(prefix) in (shared - 1, shared)


def test_a_last_token_that_what_follows_may_change_is_left_out(tokenizer: Tokenizer) -> None:
    opening = Opening(text="in u")
    prefix = opening.prefix(tokenizer, make_manifest())
    assert tokenizer.decode(prefix) == "in "  # "us" is one token


def test_a_chat_is_encoded_with_system_turn_examples_and_tools(tokenizer: Tokenizer) -> None:
    opening = Opening(system="the", examples=EXAMPLES, tools=(TOOL,))
    turns = [Message("system", "the"), *EXAMPLES, Message("user", "er")]
    expected = encode_chat(tokenizer, None, turns, BOS, 1, tools=(TOOL,))
    assert opening.encode(tokenizer, make_manifest(), "er") == expected


def test_examples_are_read_from_a_list_of_turns(tmp_path: Path) -> None:
    path = tmp_path / "examples.json"
    path.write_text(
        '[{"role": "user", "content": "the user"}, {"role": "assistant", "content": "in us"}]'
    )
    assert read_examples(path) == EXAMPLES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not a list of turns"),
        ('{"role": "user"}', "is not a list of turns: Expected `array`"),
        ('[{"role": "user"}]', "missing required field `content`"),
        ('[{"role": "robot", "content": ""}]', "Invalid enum value 'robot'"),
        ('[{"role": "user", "content": ""}]', "from 'user' to 'user'; begin with a turn of the"),
        ('[{"role": "system", "content": ""}]', "from 'system' to 'system'"),
    ],
)
def test_files_that_hold_no_examples_are_refused(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "examples.json"
    path.write_text(content)
    with pytest.raises(TokenizerError, match=message):
        read_examples(path)


def test_the_line_break_at_the_end_of_a_file_is_not_part_of_its_text(tmp_path: Path) -> None:
    path = tmp_path / "system.txt"
    path.write_text("one\ntwo\n\n")
    assert read_text(path) == "one\ntwo\n"


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"can't read .*nowhere: No such file"):
        read_text(tmp_path / "nowhere")
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    with pytest.raises(TokenizerError, match=r"byte 2 of .* is not UTF-8"):
        read_text(tmp_path / "bytes")
