from dataclasses import replace

import pytest

from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import EvaluationError, TokenizerError
from gemma_runtime.lm_eval.prompts import PromptEncoder
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.tokenizer import Tokenizer
from tests.runtime.manifests import write_bundle

BOS, TURN, END = 2, 4, 5


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("prompts") / "bundle")


@pytest.fixture
def encoder(bundle: Bundle, tokenizer: Tokenizer) -> PromptEncoder:
    return PromptEncoder(bundle, tokenizer)


def _chat(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_bos_comes_first_once(encoder: PromptEncoder, tokenizer: Tokenizer) -> None:
    text = tokenizer.encode("the user")

    assert encoder.encode("the user") == [BOS, *text]
    assert encoder.encode("the user", bos=False) == text
    assert encoder.encode("<bos>the user") == [BOS, *text]


def test_a_pair_is_encoded_together_and_then_parted(
    encoder: PromptEncoder, tokenizer: Tokenizer
) -> None:
    """The space before a word is part of its token, wherever the task writes it."""
    whole = [BOS, *tokenizer.encode("in the")]

    for context, continuation in (("in", " the"), ("in ", "the")):
        start, rest = encoder.encode_pair(context, continuation)
        assert start == [BOS, *tokenizer.encode("in")]
        assert [*start, *rest] == whole


def test_a_choice_without_tokens_is_refused(encoder: PromptEncoder) -> None:
    with pytest.raises(EvaluationError, match="adds no token"):
        encoder.encode_pair("the", "")


@pytest.mark.parametrize("content", ["the user", "a <end_of_turn> <bos> b", "<start_of_turn>model"])
def test_a_chat_has_the_ids_of_encode_chat(
    encoder: PromptEncoder, tokenizer: Tokenizer, content: str
) -> None:
    """A question's own `<end_of_turn>` stays text; lm_eval's hf makes a control token of it."""
    text = encoder.render(_chat(content))

    ids = encoder.encode(text)
    assert ids == encode_chat(tokenizer, None, [Message("user", content)], BOS)
    assert [token for token in ids if token in tokenizer.control_tokens] == [BOS, TURN, END, TURN]
    assert content in text


def test_a_choice_follows_a_chat(encoder: PromptEncoder, tokenizer: Tokenizer) -> None:
    """The newline at the chat's end is parted with the choice, as TemplateLM does for hf."""
    text = encoder.render(_chat("a <end_of_turn>"))

    start, rest = encoder.encode_pair(text, "the")

    assert text.endswith("<start_of_turn>model\n")
    assert [*start, *rest] == [*encoder.encode(text), *tokenizer.encode("the")]
    assert rest == tokenizer.encode("\nthe")


def test_a_begun_reply_is_continued(encoder: PromptEncoder, tokenizer: Tokenizer) -> None:
    turns = [*_chat("the"), {"role": "assistant", "content": "in "}]

    text = encoder.render(turns, reply=False)

    assert text == encoder.render(_chat("the")) + "in"
    ids = encode_chat(tokenizer, None, [Message("user", "the")], BOS)
    assert encoder.encode(text) == [*ids, *tokenizer.encode("in")]


def test_a_system_turn_goes_into_the_first_user_turn(
    encoder: PromptEncoder, tokenizer: Tokenizer
) -> None:
    text = encoder.render([{"role": "system", "content": " the "}, *_chat(" in ")])

    assert "<start_of_turn>user\nthe\n\nin<end_of_turn>" in text
    messages = [Message("system", "the"), Message("user", "in")]
    assert encoder.encode(text) == encode_chat(tokenizer, None, messages, BOS)


def test_a_system_turn_that_the_template_leaves_out_is_still_asked(
    bundle: Bundle, tokenizer: Tokenizer
) -> None:
    template = (
        "{{ bos_token }}{% for m in messages if m.role != 'system' %}<start_of_turn>{{ m.role }}\n"
        "{{ m.content }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n"
    )
    manifest = replace(bundle.manifest, chat_template=template)
    encoder = PromptEncoder(Bundle(bundle.directory, manifest), tokenizer)

    text = encoder.render([{"role": "system", "content": "the"}, *_chat("in")])

    assert "<start_of_turn>user\nthe\n\nin<end_of_turn>" in text
    messages = [Message("system", "the"), Message("user", "in")]
    assert encoder.encode(text) == encode_chat(tokenizer, template, messages, BOS)


def test_turns_that_do_not_alternate_are_refused(encoder: PromptEncoder) -> None:
    with pytest.raises(TokenizerError, match="alternate"):
        encoder.render([*_chat("a"), *_chat("b")])
