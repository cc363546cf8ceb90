"""The compact tokenizer and the chat format, compared with their sources."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from gemma_export.checkpoint import TokenizerFiles
from gemma_export.sidecars.chat_format import chat_format
from gemma_export.sidecars.compact_tokenizer import Kind, compact_tokenizer
from gemma_export.sidecars.phone_files import phone_files
from gemma_runtime.errors import TokenizerError
from gemma_runtime.text.chat import Message, encode_chat
from gemma_runtime.text.frame import CANONICAL_TEMPLATE
from gemma_runtime.text.tokenizer import Tokenizer
from tests.data import gemma4_vectors
from tests.data.phone_vectors import CALLS, TURNS, VECTORS, vectors, with_calls
from tests.export.conftest import Notes
from tests.runtime.conftest import (
    RESERVED,
    SPECIAL,
    gemma3_tokenizer_folder,
    small_tokenizer,
)

__all__ = ["gemma3_tokenizer_folder"]  # a fixture
TINY = Path(__file__).parents[2] / "data" / "tiny"
SMALL = json.loads(small_tokenizer().to_str())


def test_the_committed_vectors_are_those_of_the_runtime() -> None:
    committed, current = json.loads(VECTORS.read_text()), json.loads(json.dumps(vectors()))
    figures, expected = current.pop("verify"), committed.pop("verify")
    assert current == committed
    for name, agreement in figures.items():
        assert agreement == pytest.approx(expected[name], rel=1e-3, abs=1e-5)


def test_the_compact_tokenizer_of_the_committed_bundle_is_up_to_date() -> None:
    compact = compact_tokenizer((TINY / "tokenizer.json").read_bytes())
    assert (TINY / "tokenizer.gtok").read_bytes() == compact


def test_tokens_around_calls_are_control_tokens_on_phones_too() -> None:
    """They are not special, so the apps took their names in a user's text for the tokens."""
    tokenizer, compact = with_calls()
    assert CALLS.read_bytes() == compact
    (count,) = struct.unpack_from("<8xI", compact)
    kinds = np.frombuffer(compact, "u1", count, 16 + 256 * 4 + 6 * count)
    control = {token for token, kind in enumerate(kinds) if kind in (Kind.SPECIAL, Kind.RESERVED)}
    assert control == tokenizer.control_tokens


def test_the_committed_files_of_gemma_4_are_up_to_date() -> None:
    for name, content in gemma4_vectors.files().items():
        assert (gemma4_vectors.FOLDER / name).read_bytes() == content


def test_the_chat_format_of_the_committed_bundle_is_up_to_date() -> None:
    template = json.loads((TINY / "manifest.json").read_text())["chat_template"]
    chat = chat_format(template, "<bos>", "<eos>")
    assert (TINY / "chat.json").read_bytes() == chat.to_json()
    assert (chat.reply_after, chat.reply_without, chat.thinking) == ("</think>", None, None)


def test_a_format_that_asks_for_thoughts_is_one_of_its_own() -> None:
    """Gemma 4's template was refused: it leaves out what is between two texts, not before one."""
    chat = chat_format(gemma4_vectors.TEMPLATE, "<bos>", "<eos>")
    thinks = chat.thinking
    assert thinks is not None
    assert chat.reply.endswith("<|turn>model\n<|channel>thought\n<channel|>")
    assert thinks.reply.endswith("<|turn>model\n")
    assert thinks.first == "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\n"
    turns = [
        ("user", "a<|channel>b"),
        ("assistant", "<|channel>thought\nno<channel|> the <|channel>x<channel|><channel|>user"),
        ("user", "in"),
    ]
    assert "<|turn>model\nthe user<turn|>" in chat.render(turns)
    assert "a<|channel>b" in chat.render(turns)


def test_the_compact_file_contains_every_piece_with_its_kind_and_rank() -> None:
    compact = compact_tokenizer(json.dumps(SMALL).encode())
    magic, version, count, text_bytes = struct.unpack_from("<4sIII", compact)
    assert (magic, version, count) == (b"GTOK", 1, len(SMALL["model"]["vocab"]))
    start = 16 + 256 * 4
    ranks = np.frombuffer(compact, "<i4", count, start)
    lengths = np.frombuffer(compact, "<u2", count, start + 4 * count)
    kinds = np.frombuffer(compact, "u1", count, start + 6 * count)
    text = compact[start + 7 * count :]
    assert len(text) == text_bytes
    ends = lengths.cumsum()
    pieces = {
        text[end - length : end].decode(): token
        for token, (end, length) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True))
    }
    assert pieces == SMALL["model"]["vocab"]
    merged = ["".join(merge) for merge in SMALL["model"]["merges"]]
    assert [ranks[pieces[piece]] for piece in merged] == list(range(len(merged)))
    assert (ranks >= 0).sum() == len(merged)
    assert {kinds[pieces[piece]] for piece in SPECIAL} == {Kind.SPECIAL}
    assert {kinds[pieces[piece]] for piece in RESERVED} == {Kind.RESERVED}
    assert kinds[pieces["<0x41>"]] == Kind.BYTE


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("normalizer",), None, "normalizer"),
        (("pre_tokenizer",), {"type": "Whitespace"}, "splits words"),
        (("model", "byte_fallback"), False, "BPE"),
        (("model", "merges"), [["t", "h"], ["t", "h"]], "implies"),
        (("model", "merges"), [["t", "q"]], "implies"),
        (("model", "merges"), 7, "read"),
        (("added_tokens", 0, "lstrip"), True, "raw text"),
        (("added_tokens", 0, "id"), 1 << 30, "4 million"),
    ],
)
def test_a_tokenizer_that_the_compact_format_can_t_express_is_refused(
    path: tuple[str | int, ...], value: object, match: str
) -> None:
    source = json.loads(json.dumps(SMALL))
    parent = source
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with pytest.raises(TokenizerError, match=match):
        compact_tokenizer(json.dumps(source).encode())


def test_merges_in_an_order_that_ranks_can_t_express_are_refused() -> None:
    """Here a+bc precedes ab+c. The format assumes that the longer left half comes first."""
    source = json.loads(json.dumps(SMALL))
    for piece in ("ab", "bc", "abc"):
        source["model"]["vocab"][piece] = len(source["model"]["vocab"])
    source["model"]["merges"] = [["a", "b"], ["b", "c"], ["a", "bc"], ["ab", "c"]]
    with pytest.raises(TokenizerError, match="order"):
        compact_tokenizer(json.dumps(source).encode())
    source["model"]["merges"] = [["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]]
    assert compact_tokenizer(json.dumps(source).encode())


def test_the_compact_file_of_gemma_3_s_tokenizer_has_four_megabytes(
    gemma3_tokenizer_folder: Path,
) -> None:
    compact = compact_tokenizer((gemma3_tokenizer_folder / "tokenizer.json").read_bytes())
    assert len(compact) < 4.3e6
    config = json.loads((gemma3_tokenizer_folder / "tokenizer_config.json").read_text())
    chat = chat_format(config["chat_template"], "<bos>", "<eos>")
    assert (chat.system_to_user, chat.trim_user, chat.trim_system) == ("\n\n", True, False)


@pytest.mark.parametrize(
    "template",
    [
        None,
        CANONICAL_TEMPLATE.replace(" | trim", "").replace(
            'raise_exception("no system turn")', '""'
        ),
        json.loads((TINY / "manifest.json").read_text())["chat_template"],
    ],
)
def test_the_chat_format_gives_the_same_ids_as_the_template(template: str | None) -> None:
    tokenizer = Tokenizer(TINY / "tokenizer.json")
    chat = chat_format(template, "<bos>", "<eos>")
    for turns in TURNS:
        safe = [(role, content.replace("<", "")) for role, content in turns]
        messages = [Message(role, content) for role, content in safe]  # type: ignore[arg-type]
        ids = tokenizer.encode(chat.render(safe), control=True)
        assert ids == encode_chat(tokenizer, template, messages, 2)


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{{ messages[-1].content }}",  # drops earlier turns
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",  # numbers the turns
        "{% for m in messages %}{{ m.content | upper | replace('7', '') }}{% endfor %}",
        "{{ nothing.at.all }}",
    ],
)
def test_a_template_that_the_chat_format_can_t_express_is_refused(template: str) -> None:
    with pytest.raises(TokenizerError, match="chat template"):
        chat_format(template, "<bos>", "<eos>")


def test_a_tokenizer_that_phones_can_t_use_is_omitted_with_a_note() -> None:
    notes = Notes()
    files = phone_files(TokenizerFiles(b"{}", None), "<bos>", "<eos>", notes)
    assert list(files) == ["chat_format"]
    assert len(notes.texts) == 1
    assert "tokenizer.gtok" in notes.texts[0]
