from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as RawTokenizer

from gemma_runtime.bundle import Bundle
from gemma_runtime.errors import TokenizerError
from gemma_runtime.manifest import (
    SCHEMA_VERSION,
    Agreement,
    Headroom,
    Manifest,
    Model,
    Quantization,
    Target,
)
from gemma_runtime.text.tokenizer import Tokenizer, load_tokenizer
from tests.runtime.conftest import RESERVED, SPECIAL, small_tokenizer

SMALL = small_tokenizer()
TOKENS = st.lists(st.integers(0, SMALL.get_vocab_size() + 3), max_size=40)
BYTES = st.binary(max_size=12)
MARKED = st.lists(st.sampled_from([*SPECIAL, *RESERVED]) | st.text(max_size=5)).map("".join)


def byte_tokens(tokenizer: Tokenizer, data: bytes) -> list[int]:
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in data]
    return [token for token in ids if token is not None]


def test_words_spaces_and_runs_of_newlines_become_pieces(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.piece(token) for token in tokenizer.encode("in the  user\n\n\n<b>")]
    assert pieces == ["in", "▁the", "▁▁", "user", "\n\n\n", "<b>"]


def test_encoding_adds_no_bos(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    assert tokenizer.token_id("<bos>") not in tokenizer.encode("the", control=True)


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_decoding_gives_the_encoded_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=MARKED)
def test_text_never_becomes_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.control_tokens.isdisjoint(ids)
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_the_name_of_a_special_token_is_encoded_as_text(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.piece(token) for token in tokenizer.encode("<eos>")]
    assert pieces == ["<e", "o", "s", ">"]


@pytest.mark.parametrize("piece", [*SPECIAL, *RESERVED])
def test_a_template_can_write_a_marker(tokenizer: Tokenizer, piece: str) -> None:
    ids = tokenizer.encode(f"ing{piece}user", control=True)
    assert [tokenizer.piece(token) for token in ids] == ["ing", piece, "user"]


def test_the_longest_marker_wins(tmp_path: Path) -> None:
    """`<image>` begins `<image>s`, and the reserved `<mask>` begins `<mask>ed`."""
    raw = small_tokenizer()
    names = ["<image>", "<image>s", "<mask>ed"]
    raw.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")

    ids = tokenizer.encode("<image>s<image><mask>ed<mask>", control=True)

    pieces = [tokenizer.piece(token) for token in ids]
    assert pieces == ["<image>s", "<image>", "<mask>ed", "<mask>"]


def test_a_reserved_name_that_the_vocabulary_lacks_is_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_id("<unused99>") is None
    ids = tokenizer.encode("<unused99>", control=True)
    assert ids == tokenizer.encode("<unused99>")
    assert tokenizer.decode(ids) == "<unused99>"


def test_control_and_unknown_tokens_are_not_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<bos>the<unused0><end_of_turn>", control=True)
    assert tokenizer.decode([*ids, 10**6]) == "the"


@given(tokens=TOKENS)
def test_streamed_pieces_join_to_the_decoded_text(tokenizer: Tokenizer, tokens: list[int]) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(tokens)


@given(text=st.text(max_size=8), tokens=TOKENS)
def test_valid_tokens_decode_as_in_the_tokenizers_package(
    tokenizer: Tokenizer, text: str, tokens: list[int]
) -> None:
    data = set(byte_tokens(tokenizer, bytes(range(256))))
    shown = [t for t in tokens if t not in data | tokenizer.control_tokens]
    tokens = [*shown, *byte_tokens(tokenizer, text.encode()), *shown]
    assert tokenizer.decode(tokens) == SMALL.decode(tokens)


@given(data=BYTES)
def test_each_invalid_byte_decodes_to_one_replacement(tokenizer: Tokenizer, data: bytes) -> None:
    """Characters next to an invalid byte stay; the tokenizers package loses them."""
    text = tokenizer.decode(byte_tokens(tokenizer, data))
    valid = data.decode(errors="ignore")
    assert text.replace("\ufffd", "") == valid.replace("\ufffd", "")
    assert text.count("\ufffd") == len(data) - len(valid.encode()) + valid.count("\ufffd")


def test_a_character_appears_with_its_last_byte(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    pushed = [stream.push(token) for token in byte_tokens(tokenizer, "é€😀".encode())]
    assert pushed == ["", "é", "", "", "€", "", "", "", "😀"]
    assert stream.flush() == ""


def test_an_incomplete_character_gives_one_replacement_per_byte(tokenizer: Tokenizer) -> None:
    tokens = byte_tokens(tokenizer, "😀".encode()[:3])
    assert tokenizer.decode(tokens) == SMALL.decode(tokens) == "\ufffd" * 3
    the = tokenizer.encode("in")
    assert tokenizer.decode([*tokens, *the]) == "\ufffd\ufffd\ufffdin"


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_a_tokenizer_s_truncation_and_padding_are_ignored(tmp_path: Path) -> None:
    """Some tokenizer.json files contain truncation settings from when they were saved."""
    raw = small_tokenizer()
    raw.enable_truncation(2)
    raw.enable_padding(length=8)
    raw.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer(tmp_path / "tokenizer.json").encode("a b c")) == 5


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"'])
def test_a_broken_file_gives_one_error_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer\.json") as caught:
        Tokenizer(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="absent"):
        Tokenizer(tmp_path / "absent.json")


def test_a_decoder_that_cannot_stream_is_refused(tmp_path: Path) -> None:
    raw: RawTokenizer = small_tokenizer()
    raw.decoder = decoders.Metaspace()
    raw.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="decodes with Metaspace"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_the_tokenizer_is_loaded_from_the_bundle(tokenizer_path: Path) -> None:
    bundle = Bundle(tokenizer_path.parent, manifest({"tokenizer": tokenizer_path.name}))
    assert load_tokenizer(bundle).decode(load_tokenizer(bundle).encode("the")) == "the"


def test_without_a_tokenizer_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer.*export from a checkpoint"):
        load_tokenizer(Bundle(tmp_path, manifest({})))


def test_gemma_3_s_tokenizer_encodes_as_in_the_tokenizers_package(
    gemma3_tokenizer_folder: Path,
) -> None:
    path = gemma3_tokenizer_folder / "tokenizer.json"
    tokenizer, raw = Tokenizer(path), RawTokenizer.from_file(str(path))
    for text in ("Hello, world!", "  code:\n\n\tdef f(x):\n", "日本語 😀 ∮ 𒀀", "<table> <br>"):
        ids = tokenizer.encode(text)
        assert ids == raw.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
    for piece in ("<bos>", "<end_of_turn>", "<start_of_image>", "<unused42>", "<mask>"):
        assert tokenizer.control_tokens.isdisjoint(tokenizer.encode(f"a{piece}b"))
        assert tokenizer.encode(piece, control=True) == [raw.token_to_id(piece)]


def manifest(roles: dict[str, str]) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        model=Model("random:0", "gemma3", 1, None, ""),
        target=Target("onnx", "ONNX Runtime", ("onnxruntime",), "1.0"),
        quantization=Quantization("none", 32.0, "", {}, None),
        vocab_size=8,
        context_length=8,
        prefill_length=8,
        bos_token=2,
        eos_token=1,
        stop_tokens=(),
        sampling=None,
        chat_template=None,
        layers=(),
        cache_dtype="float32",
        graphs={},
        headroom=Headroom(0.0, 1.0),
        quality=Agreement(1, 1.0, 0, 0.0, 0.0, 0.0, 0.0),
        files={},
        roles=roles,
        tools={},
        ropes={},
    )
