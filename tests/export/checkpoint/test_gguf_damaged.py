"""Damaged or unsupported GGUF files give a one-line error, without a crash or a huge allocation."""

import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFEndian, GGUFWriter
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_export.checkpoint.gguf import open_gguf
from gemma_runtime.errors import CheckpointError, ConfigError, GemmaError
from tests.export.gguf_files import (
    F32,
    GEMMA3,
    TYPES,
    Metadata,
    Stored,
    llama_metadata,
    peak_of,
    random_tensors,
    write_gguf,
    write_tiny,
)

MIB = 1 << 20


REFUSED: dict[str, tuple[Metadata, dict[str, Stored | None], str]] = {
    "unknown tensor": (
        {},
        {"blk.0.attn_q.lora_a": (np.ones((2, 32), "f4"), F32)},
        "blk.0.attn_q.lora_a",
    ),
    "unknown layer": ({}, {"blk.9.attn_norm.weight": (np.ones(256, "f4"), F32)}, "layers.9.input"),
    "missing": ({}, {"blk.3.ffn_up.weight": None}, "layers.3.mlp.up_proj.weight is missing"),
    "no table": ({}, {"token_embd.weight": None}, "token_embd.weight is missing"),
    "shape": ({}, {"output_norm.weight": (np.ones(32, "f4"), F32)}, r"\(32,\), the config says"),
    "head": ({}, {"output.weight": (np.ones((63, 256), "f4"), F32)}, r"lm_head\.weight has shape"),
    "type": (
        {},
        {"output_norm.weight": (np.ones(144, "u1"), GGMLQuantizationType.NVFP4)},
        "NVFP4, which can't be read; expected one of F32, F16",
    ),
    "split": ({"split.count": 3}, {}, "one of 3 parts.*llama-gguf-split --merge"),
    "architecture": ({"general.architecture": "llama"}, {}, "'llama' is not supported"),
    "no window": ({"gemma3.attention.sliding_window": "x"}, {}, "sliding_window is 'x'"),
    "layers": ({"gemma3.block_count": 2**32 - 1}, {}, "more than there are tensors"),
    "list": ({"gemma3.attention.head_count": [2] * 7}, {}, "head_count is a list"),
    "eos": ({"tokenizer.ggml.eos_token_id": 64}, {}, "eos_token_id is 64"),
    "tokens": ({"tokenizer.ggml.tokens": ["x"] * 65}, {}, "64 rows for 65 tokens"),
    "rope": ({"gemma3.rope.scaling.type": "yarn"}, {}, "'yarn', expected default, linear or"),
    "pattern": ({"gemma3.attention.sliding_window_pattern": [True]}, {}, "one flag per layer"),
}


@pytest.mark.parametrize(("metadata", "tensors", "match"), REFUSED.values(), ids=list(REFUSED))
def test_the_error_for_wrong_metadata_or_tensors_names_them_and_the_file(
    tmp_path: Path, metadata: Metadata, tensors: dict[str, Stored | None], match: str
) -> None:
    path = write_tiny(tmp_path, metadata=metadata, tensors=tensors)
    with pytest.raises((CheckpointError, ConfigError), match=match) as error:
        open_gguf(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("key", ["gemma3.rope.freq_base", "gemma3.attention.sliding_window"])
def test_a_gemma_3_without_a_required_field_is_refused(tmp_path: Path, key: str) -> None:
    metadata = llama_metadata(GEMMA3)
    del metadata[key]
    with pytest.raises(ConfigError, match=f"no {key}"):
        open_gguf(write_gguf(tmp_path / "m.gguf", metadata, random_tensors(GEMMA3)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_are_refused_when_their_rows_are_read(tmp_path: Path, value: float) -> None:
    up = np.zeros((512, 256), np.float32)
    up[300, 5] = value
    checkpoint = open_gguf(write_tiny(tmp_path, tensors={"blk.1.ffn_up.weight": (up, F32)}))
    name = "model.layers.1.mlp.up_proj.weight"
    assert not checkpoint.rows(name, 0, 300).any()
    with pytest.raises(CheckpointError, match=f"{name} contains NaN"):
        checkpoint.rows(name, 300, 301)


@pytest.mark.parametrize("type", [t for t in TYPES if t.name.startswith("Q")], ids=lambda t: t.name)
def test_a_damaged_scale_gives_an_error_and_no_numpy_warning(
    tmp_path: Path, type: GGMLQuantizationType
) -> None:
    data, _ = random_tensors(GEMMA3, type)["blk.0.ffn_up.weight"]
    ones = np.full_like(data, 0xFF)
    checkpoint = open_gguf(
        write_tiny(tmp_path, type=type, tensors={"blk.0.ffn_up.weight": (ones, type)})
    )
    with pytest.raises(CheckpointError, match="contains NaN"):
        checkpoint.rows("model.layers.0.mlp.up_proj.weight", 0, 4)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_tiny(tmp_path)
    checkpoint = open_gguf(path)
    os.truncate(path, 9000)
    with pytest.raises(CheckpointError, match="ended inside"):
        checkpoint.rows("model.norm.weight", 0, 256)


def test_big_endian_files_are_refused(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "big.gguf", "gemma3", endianess=GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="expected 2 or 3, little-endian"):
        open_gguf(tmp_path / "big.gguf")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04rest", b"GGUF\x01\0\0\0" + bytes(16)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="expected"):
        open_gguf(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        open_gguf(tmp_path / "none.gguf")


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a valid file with one layer, so that the header is a large part of it."""
    hf = {**GEMMA3, "num_hidden_layers": 1}
    folder = tmp_path_factory.mktemp("valid")
    return write_tiny(folder, hf, GGMLQuantizationType.Q4_0).read_bytes()


@pytest.fixture(scope="module")
def damaged_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "damaged.gguf"


def opens_or_refuses(path: Path) -> None:
    """Open a file and read everything: it must succeed or raise a short, one-line error."""
    message = ""
    try:
        checkpoint = open_gguf(path)
        checkpoint.tokenizer()
        for name, shape in checkpoint.config.tensor_shapes().items():
            checkpoint.rows(name, 0, min(shape[0], 4))
    except GemmaError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 1000


def test_a_file_truncated_anywhere_is_refused(valid: bytes, damaged_path: Path) -> None:
    for length in [*range(0, 5000, 41), *range(5000, len(valid) - 512, 9973)]:
        damaged_path.write_bytes(valid[:length])
        with pytest.raises(CheckpointError):
            open_gguf(damaged_path)


@pytest.mark.parametrize("offset", [0, 32, 2**63])
def test_a_tensor_with_a_wrong_offset_is_refused(
    valid: bytes, damaged_path: Path, offset: int
) -> None:
    """Otherwise the bytes of another tensor would be read without any error."""
    name = b"output_norm.weight"
    field = valid.index(name) + len(name) + 4 + 8 + 4  # after rank, shape (one number) and type
    damaged_path.write_bytes(valid[:field] + offset.to_bytes(8, "little") + valid[field + 8 :])
    with pytest.raises(CheckpointError, match=r"output_norm.weight begins at byte \d+, expected"):
        open_gguf(damaged_path)


HEADER = 2200  # bytes of the valid file; the weights follow
BYTES = st.tuples(st.integers(0, HEADER), st.binary(min_size=1, max_size=1))
NUMBERS = st.tuples(
    st.integers(0, HEADER),
    st.sampled_from([0, 1, 2**20, 2**26, 2**31, 2**40, 2**63, 2**64 - 1]).map(
        lambda number: number.to_bytes(8, "little")
    ),
)


@settings(max_examples=400, deadline=None)
@given(edits=st.lists(BYTES | NUMBERS, min_size=1, max_size=4))
def test_a_damaged_header_never_causes_a_crash_or_a_large_allocation(
    valid: bytes, damaged_path: Path, edits: list[tuple[int, bytes]]
) -> None:
    content = bytearray(valid)
    for start, new in edits:
        content[start : start + len(new)] = new
    damaged_path.write_bytes(content)
    assert peak_of(lambda: opens_or_refuses(damaged_path)) < 64 * MIB
