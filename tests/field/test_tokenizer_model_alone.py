"""A folder with `tokenizer.model` but no `tokenizer.json` gives the ids of transformers."""

import io
import random
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from gemma_export.checkpoint.gguf import open_gguf
from gemma_export.checkpoint.packaged import find_demo_gguf
from gemma_export.checkpoint.sentencepiece import tokenizer_from_sentencepiece
from gemma_export.checkpoint.tokenizer_folder import read_tokenizer
from gemma_export.quantize.calibrate import text
from gemma_export.sidecars.compact_tokenizer import compact_tokenizer
from gemma_runtime.errors import CheckpointError
from gemma_runtime.formats.gguf import read_gguf_header

SYMBOLS = ["<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "▁▁", "▁▁▁"]
CORPUS = Path(text.__file__).with_name("calibration.txt").read_text("utf-8")


def train(folder: Path, model_type: str = "bpe") -> Path:
    """A folder with a small SentencePiece model with Gemma's settings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS[:60_000].splitlines()),
        model_writer=model,
        vocab_size=900,
        character_coverage=0.98,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        split_digits=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=SYMBOLS,
        num_threads=1,
        minloglevel=2,
        model_type=model_type,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "config.json").write_text('{"model_type": "gemma3_text"}')
    return folder


def texts(count: int) -> list[str]:
    """Snippets of many languages, joined by white space and markers."""
    rng = random.Random(5)
    joints = [
        " ",
        "  ",
        "     ",
        "\n",
        "\n\n\n",
        "\t",
        "▁",
        "\x00",
        "👩\u200d👧",
        "<end_of_turn>\n",
    ]
    snippets = [CORPUS[i : i + rng.randrange(1, 90)] for i in range(0, len(CORPUS), 97)]
    mixed = ["".join(rng.choices([*joints, *snippets], k=6)) for _ in range(count)]
    # where two merges into one piece overlap: "a" + "na" and "an" + "a"
    parts = ["an", "a", "ha", "=-", "--", " ", "..", "n", "en", "é", "の"]
    return mixed + ["".join(rng.choices(parts, k=12)) for _ in range(count // 4)]


def check_ids(folder: Path, count: int) -> None:
    reference = AutoTokenizer.from_pretrained(folder)
    files = read_tokenizer(folder, 10**6)
    assert files is not None
    ours = Tokenizer.from_str(files.tokenizer_json.decode())
    for sample in texts(count):
        ids = ours.encode(sample, add_special_tokens=False).ids
        assert ids == reference.encode(sample, add_special_tokens=False), sample
        assert ours.decode(ids, skip_special_tokens=False) == reference.decode(ids)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_thousands_of_texts_have_the_ids_of_transformers(tmp_path: Path, kind: str) -> None:
    check_ids(train(tmp_path, model_type=kind), 1_500)


def test_phones_can_read_it(tmp_path: Path) -> None:
    files = read_tokenizer(train(tmp_path), 10**6)
    assert files is not None
    assert compact_tokenizer(files.tokenizer_json)


def test_turns_are_control_tokens(tmp_path: Path) -> None:
    """In Gemma's model they are ordinary user-defined pieces; users could then write them."""
    files = read_tokenizer(train(tmp_path), 10**6)
    assert files is not None
    added = Tokenizer.from_str(files.tokenizer_json.decode()).get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    assert special == {"<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"}


def test_a_tokenizer_json_is_preferred(tmp_path: Path) -> None:
    folder = train(tmp_path)
    (folder / "tokenizer.json").write_bytes(b'{"model": {"vocab": {}}, "added_tokens": []}')
    files = read_tokenizer(folder, 10**6)
    assert files is not None
    assert files.tokenizer_json == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "it has no pieces"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is not a SentencePiece model"),
        (b"\x0a\x05\x0a\x03<s>", "no unknown piece"),
        (b"\x0a\x05\x0a\x03<s>\x0a\x05\x0a\x03<s>", "two pieces of the same text"),
        (b"\x0a\x05\x0a\x01x\x18\x02\x12\x03\xc8\x02\x09", "piece 9 as bos, expected one of 1"),
    ],
)
def test_a_damaged_model_is_refused_by_name(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"tokenizer.model.*{match}"):
        tokenizer_from_sentencepiece(path)


@pytest.mark.real
def test_gemma_3_s_own_pieces_have_the_ids_of_transformers_and_of_the_gguf(tmp_path: Path) -> None:
    metadata = read_gguf_header(find_demo_gguf()).metadata
    columns = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.trainer_spec.bos_id = 2
    for piece, score, kind in zip(*columns, strict=True):
        is_space = kind == 4 and not piece.strip(" ")
        kind = 2 if piece == "<unk>" else int(kind)
        name = "▁" * len(piece) if is_space else piece
        model.pieces.add(piece=name, score=float(score), type=kind)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    check_ids(tmp_path, 500)
    gguf = open_gguf(find_demo_gguf()).tokenizer()
    files = read_tokenizer(tmp_path, 10**6)
    assert files is not None
    assert gguf is not None
    built, rebuilt = (Tokenizer.from_str(each.tokenizer_json.decode()) for each in (files, gguf))
    for sample in texts(500):
        assert built.encode(sample).ids == rebuilt.encode(sample).ids
