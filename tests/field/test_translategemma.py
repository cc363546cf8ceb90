"""TranslateGemma: a Gemma 3 whose turns are lists with a text and two language codes."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from gemma_export.checkpoint import TokenizerFiles
from gemma_export.sidecars.phone_files import phone_files
from gemma_runtime.bundle import Bundle
from gemma_runtime.cli import run_command as run
from gemma_runtime.errors import TokenizerError
from gemma_runtime.session import open_session
from gemma_runtime.text.chat import Message, encode_chat, render_chat
from gemma_runtime.text.conversation import Conversation
from gemma_runtime.text.frame import read_languages
from gemma_runtime.text.tokenizer import Tokenizer, load_tokenizer
from tests.export.conftest import Notes, export_folder
from tests.export.models import SHORT_GEMMA3, save_tiny
from tests.runtime.conftest import BOS, small_tokenizer

# After the documented form of the messages; written for this test.
TEMPLATE = """\
{%- set names = {'en': 'English', 'de': 'German', 'pt_BR': 'Brazilian Portuguese'} -%}
{{ bos_token }}
{%- if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}
{%- for message in messages %}
  {%- if message.role == 'user' %}
    {%- if message.content is string or message.content | length != 1 %}
      {{- raise_exception('a list with one mapping, please') }}
    {%- endif %}
    {%- set one = message.content[0] %}
    {%- set source, target = one['source_lang_code'], one['target_lang_code'] %}
    {%- if source not in names or target not in names %}
      {{- raise_exception('no such language') }}
    {%- endif %}
    {{- '<start_of_turn>user\nTranslate ' + names[source] + ' (' + source + ') to ' }}
    {{- names[target] + ' (' + target + '):\n\n\n' + one['text'] | trim + '<end_of_turn>\n' }}
  {%- else %}
    {{- '<start_of_turn>model\n' + message.content | trim + '<end_of_turn>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""
TEXTS = ["the user", " in <end_of_turn> the\n", "8" * 40]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(tmp_path / "tokenizer.json")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder, raw = tmp_path_factory.mktemp("translate"), small_tokenizer()
    config = copy.deepcopy(SHORT_GEMMA3.config)
    config.vocab_size = raw.get_vocab_size()
    save_tiny(replace(SHORT_GEMMA3, config=config), folder)
    raw.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return export_folder(folder, "none", folder / "bundle")


@pytest.mark.parametrize("text", [TEXTS[0], TEXTS[2]])
@pytest.mark.parametrize("languages", [("en", "de"), ("de", "pt_BR")])
def test_ids_are_those_of_transformers(
    tokenizer: Tokenizer, text: str, languages: tuple[str, str]
) -> None:
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    reference: Any = PreTrainedTokenizerFast
    reference = reference(tokenizer_object=small_tokenizer(), **names)
    source, target = languages
    content = [
        {"type": "text", "source_lang_code": source, "target_lang_code": target, "text": text}
    ]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "sing"},
        {"role": "user", "content": content},
    ]
    expected = reference.apply_chat_template(
        messages, chat_template=TEMPLATE, add_generation_prompt=True, return_dict=False
    )
    turns = [Message("user", text), Message("assistant", "sing"), Message("user", text)]
    assert encode_chat(tokenizer, TEMPLATE, turns, BOS, languages=languages) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_can_t_become_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = encode_chat(tokenizer, TEMPLATE, [Message("user", text)], BOS, languages=("en", "de"))
    control = [tokenizer.token_id(f"<{edge}_of_turn>") for edge in ("start", "end", "start")]
    assert [token for token in ids if token in set(control)] == control


def test_languages_are_needed_by_this_template_and_by_no_other(tokenizer: Tokenizer) -> None:
    turn = [Message("user", "the user")]
    for encode in (encode_chat, render_chat):
        with pytest.raises(TokenizerError, match="the chat template translates; say from which"):
            encode(tokenizer, TEMPLATE, turn, BOS)
    with pytest.raises(TokenizerError, match="reads no source_lang_code; leave --translate out"):
        encode_chat(tokenizer, None, turn, BOS, languages=("en", "de"))
    with pytest.raises(TokenizerError, match="refuses the conversation: no such language"):
        encode_chat(tokenizer, TEMPLATE, turn, BOS, languages=("en", "xx"))


@pytest.mark.parametrize("text", ["en", "en:", ":de", "en:de:fr", "en:<eos>", "english:de"])
def test_what_isn_t_two_codes_is_refused(text: str) -> None:
    with pytest.raises(TokenizerError, match=r"expected two language codes, e\.g\. en:de"):
        read_languages(text)
    assert read_languages("zh-Hant:pt_BR") == ("zh-Hant", "pt_BR")


def test_phones_get_no_chat_format_and_a_note_says_so(tmp_path: Path) -> None:
    notes = Notes()
    files = TokenizerFiles(small_tokenizer().to_str().encode(), TEMPLATE)
    assert phone_files(files, "<bos>", "<eos>", notes).keys() == {"tokenizer_compact"}
    assert "the chat template translates" in notes.texts[0]
    assert "the bundle gets no chat.json" in notes.texts[0]


def test_a_bundle_translates_with_languages_only(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(bundle.directory), "the user", "--chat", "--max-new-tokens", "3"]
    assert run(command) == 1
    assert "the chat template translates; say from which" in capsys.readouterr().err
    assert run([*command, "--translate", "en"]) == 1
    assert "expected two language codes" in capsys.readouterr().err
    assert run([*command, "--translate", "en:de", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    manifest, tokenizer = bundle.manifest, load_tokenizer(bundle)
    with open_session(bundle) as session:
        conversation = Conversation(
            session,
            tokenizer,
            template=manifest.chat_template,
            bos_token=manifest.bos_token,
            stop_tokens=manifest.stop_tokens,
            languages=("en", "de"),
        )
        reply = conversation.send("the user", 3)
        list(reply)
        assert reply.result.text == written["text"]
        list(conversation.send("in", 3))  # the first turn is rendered as before
        assert conversation.messages[0] == Message("user", "the user")
