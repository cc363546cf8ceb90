"""GGUF models as people have them: every block type, parts, folders, repositories, Ollama's."""

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from gemma_export.checkpoint.gguf import open_gguf
from gemma_export.checkpoint.gguf_choice import choose
from gemma_export.checkpoint.open import open_checkpoint
from gemma_runtime.errors import CheckpointError
from gemma_runtime.formats.gguf import BLOCKS, GgufType
from gemma_runtime.manifest import AttentionKind, Rope
from tests.export.gguf_files import (
    F32,
    GEMMA3,
    Metadata,
    Stored,
    llama_metadata,
    llama_name,
    random_tensors,
    write_gguf,
    write_tiny,
)

UP = "model.layers.0.mlp.up_proj.weight"
STORED_UP = "blk.0.ffn_up.weight"


def random_blocks(kind: GGMLQuantizationType, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Blocks of random bytes that dequantize to finite numbers."""
    block, size = GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(kind)
    data = generator.integers(0, 256, (shape[0], shape[1] // block, size), np.uint8)
    rows = data.reshape(-1, size)
    with np.errstate(all="ignore"):
        while len(bad := np.flatnonzero(~np.isfinite(dequantize(rows, kind)).all(-1))):
            rows[bad] = generator.integers(0, 256, (len(bad), size), np.uint8)
    return rows.reshape(shape[0], -1)


@pytest.mark.parametrize("kind", [k for k in GgufType if BLOCKS[k][0] > 1], ids=lambda k: k.name)
def test_every_block_type_of_the_gguf_package_is_dequantized(
    tmp_path: Path, kind: GgufType
) -> None:
    type = GGMLQuantizationType(kind)
    data = random_blocks(type, (512, 256))
    tensors: dict[str, Stored | None] = {STORED_UP: (data, type)}
    checkpoint = open_gguf(write_tiny(tmp_path, tensors=tensors))
    expected = dequantize(data, type)
    assert np.array_equal(checkpoint.rows(UP, 3, 200).numpy(), expected[3:200])
    assert kind.name in checkpoint.notes[0]


def test_a_type_with_scales_outside_of_its_blocks_is_refused_by_name(tmp_path: Path) -> None:
    data = np.zeros((512, 256 // 64 * 36), np.uint8)
    stored: dict[str, Stored | None] = {STORED_UP: (data, GGMLQuantizationType.NVFP4)}
    with pytest.raises(CheckpointError, match=r"ffn_up\.weight is NVFP4, which can't be read"):
        open_gguf(write_tiny(tmp_path, tensors=stored))


# Split files


def split(folder: Path, count: int = 3, **changes: Any) -> list[Path]:
    """The tiny model in parts, as llama-gguf-split writes them: metadata in the first only."""
    tensors = random_tensors(GEMMA3, GGMLQuantizationType.Q8_0)
    names = list(tensors)
    paths = []
    for index in range(count):
        own = names[index::count]
        metadata: Metadata = llama_metadata(GEMMA3) if index == 0 else {}
        metadata |= {"general.architecture": "gemma3", "split.no": index, "split.count": count}
        metadata |= {"split.tensors.count": len(names), **changes}
        path = folder / f"tiny-{index + 1:05}-of-{count:05}.gguf"
        paths.append(write_gguf(path, metadata, {name: tensors[name] for name in own}))
    return paths


def test_a_split_model_is_read_as_one_whichever_part_is_given(tmp_path: Path) -> None:
    whole = open_gguf(write_tiny(tmp_path, type=GGMLQuantizationType.Q8_0))
    (tmp_path / "parts").mkdir()
    paths = split(tmp_path / "parts")
    first = open_checkpoint(str(paths[0]))
    for source in (paths[2], tmp_path / "parts"):
        checkpoint = open_checkpoint(str(source))
        assert checkpoint.digest() == first.digest() != whole.digest()
        assert checkpoint.config == whole.config
        for name, shape in whole.config.tensor_shapes().items():
            rows = checkpoint.rows(name, 0, shape[0])
            assert np.array_equal(rows.numpy(), whole.rows(name, 0, shape[0]).numpy())
        assert checkpoint.tokenizer() is not None


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"tiny-00002-of-00003\.gguf is missing, part 2 of 3"):
        open_gguf(paths[0])


def test_parts_of_different_models_are_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    shutil.copy(paths[0], paths[1])
    with pytest.raises(CheckpointError, match=r"split.no and split.count are \(0, 3\), expected"):
        open_gguf(paths[0])


def test_too_few_tensors_in_all_parts_are_refused(tmp_path: Path) -> None:
    paths = split(tmp_path, **{"split.tensors.count": 99})
    with pytest.raises(CheckpointError, match="have 93 different tensors, the first part says 99"):
        open_gguf(paths[0])


def test_a_renamed_part_is_refused_with_the_expected_name(tmp_path: Path) -> None:
    path = split(tmp_path)[0].rename(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"expected a name like MODEL-00001-of-00003\.gguf"):
        open_gguf(path)


# Folders and repositories


def test_a_folder_with_one_model_beside_a_vision_projector_is_opened(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    (tmp_path / "mmproj-model-f16.gguf").write_bytes(b"GGUF")
    assert open_checkpoint(str(tmp_path)).id == "model.gguf"


def test_a_folder_with_several_models_asks_which_one(tmp_path: Path) -> None:
    path = write_tiny(tmp_path)
    shutil.copy(path, tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match=r"has 2 GGUF models: model\.gguf, other\.gguf; give"):
        open_checkpoint(str(tmp_path))


NAMES = (
    "README.md",
    "config.json",
    "mmproj-F16.gguf",
    "gemma-3-4b-it-Q4_0.gguf",
    "gemma-3-4b-it-Q4_K_M.gguf",
    "gemma-3-4b-it-Q4_K_S.gguf",
    "BF16/gemma-3-4b-it-BF16-00001-of-00002.gguf",
    "BF16/gemma-3-4b-it-BF16-00002-of-00002.gguf",
)


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("Q4_0", NAMES[3]),
        ("q4_k_m", NAMES[4]),
        ("*_S.gguf", NAMES[5]),
        ("gemma-3-4b-it-Q4_K_M.gguf", NAMES[4]),
        ("BF16", NAMES[6]),
        ("BF16/*", NAMES[6]),
    ],
)
def test_a_pattern_chooses_one_model_of_a_repository(pattern: str, chosen: str) -> None:
    assert choose("owner/name", NAMES, pattern) == chosen


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("", "has 4 GGUF models: BF16/gemma-3-4b-it-BF16-00001-of-00002.gguf, gemma.*which one"),
        ("Q4_K", "'Q4_K' matches 2 of 4 GGUF models: gemma-3-4b-it-Q4_K_M.gguf, gemma"),
        ("Q9", "'Q9' matches 0 of 4 GGUF models: BF16"),
    ],
)
def test_an_unclear_choice_lists_the_models(pattern: str, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        choose("owner/name", NAMES, pattern)
    assert "--checkpoint owner/name:PATTERN" in str(error.value)


# Ollama


def ollama(folder: Path) -> Path:
    """As Ollama's converter writes Gemma 3 4b: its own keys, vision inside, no suffix."""
    metadata = llama_metadata(GEMMA3)
    for key in ("rope.freq_base", "attention.layer_norm_rms_epsilon", "attention.key_length"):
        del metadata[f"gemma3.{key}"]
    metadata |= {
        "gemma3.rope.global.freq_base": 500_000.0,
        "gemma3.rope.local.freq_base": 20_000.0,
        "gemma3.final_logit_softcapping": 30.0,
        "gemma3.vision.block_count": 27,
        "gemma3.mm.tokens_per_image": 256,
    }
    stored = {**random_tensors(GEMMA3), "v.patch_embedding.weight": (np.ones((4, 4), "f4"), F32)}
    return write_gguf(folder / f"sha256-{'ab' * 32}", metadata, stored)


def test_an_ollama_blob_is_read_with_its_own_keys(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(ollama(tmp_path)))
    config = checkpoint.config
    assert config.ropes[AttentionKind.GLOBAL] == Rope(500_000.0, 1.0)
    assert config.ropes[AttentionKind.LOCAL] == Rope(20_000.0, 1.0)
    assert config.final_softcap is None
    assert (config.head_dim, config.rms_norm_eps) == (128, 1e-6)
    assert any("without its 1 vision tensors" in note for note in checkpoint.notes)
    plain = open_gguf(write_tiny(tmp_path))
    assert np.array_equal(checkpoint.rows(UP, 0, 9).numpy(), plain.rows(UP, 0, 9).numpy())


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sha256-ab").write_bytes(struct.pack("<I", 7))
    with pytest.raises(CheckpointError, match="is neither a folder with safetensors nor a"):
        open_checkpoint(str(tmp_path / "sha256-ab"))


def test_the_names_of_the_test_file_are_those_of_llama_cpp() -> None:
    assert llama_name(GEMMA3, UP) == STORED_UP
