"""Folders of llm-compressor: int4 and int8 codes are kept, float8 is dequantized."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CompressedTensorsConfig

from gemma_export.checkpoint.folder import open_folder
from gemma_export.formats.format import Format
from gemma_export.model.config import HEAD, TABLE
from gemma_runtime.errors import CheckpointError, ConfigError
from tests.field.folders import configure
from tests.field.packed_models import (
    UP,
    all_rows,
    our_logits,
    rounded,
    save_packed,
    source_store,
    their_logits,
)

GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
ASYM = {**GROUP, "symmetric": False}
CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
PACKED = "pack-quantized"
KEPT = {
    "w4a16-group": (GROUP, PACKED, Format(4)),
    "w4a16-group-asym": (ASYM, PACKED, Format(4, 32, True)),
    "w4a16-channel": ({**GROUP, "strategy": "channel", "group_size": None}, PACKED, Format(4, 128)),
    "w8a16-group-asym": ({**ASYM, "num_bits": 8}, PACKED, Format(8, 32, True)),
    "w8a16-channel": (CHANNEL, PACKED, Format(8, 128)),
    "w8a8-channel": (CHANNEL, "int-quantized", Format(8, 128)),
}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}


def quantization(weights: dict[str, Any], form: str, **fields: Any) -> dict[str, Any]:
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    if form in ("int-quantized", "float-quantized"):
        kind = {"num_bits": 8, "type": weights["type"], "strategy": "token", "dynamic": True}
        group["input_activations"] = {**kind, "symmetric": True}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
    }
    config |= {"config_groups": {"group_0": group}, "quantization_status": "compressed"}
    return {"quantization_config": {**config, **fields}}


def compress(weight: Tensor, weights: dict[str, Any], form: str) -> dict[str, Tensor]:
    """The package's own tensors for a matrix, with scales that float16 can store."""
    args = QuantizationArgs(**weights)
    count = weight.shape[1] // args.group_size if args.strategy == "group" else 1
    blocks = weight.reshape(len(weight), count, -1)
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    state = {"weight": weight, "weight_scale": scale.half().float()}
    if not args.symmetric:
        state["weight_zero_point"] = zero.to(torch.int8)
    if args.strategy == "tensor":
        state["weight_scale"] = scale.amax().half().float()[None]
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    return dict(BaseCompressor.get_value_from_registry(form).compress(state, scheme))


def save(
    folder: Path, weights: dict[str, Any], form: str, head: bool = False, **fields: Any
) -> Path:
    config = quantization(weights, form, **({"ignore": []} if head else {}), **fields)
    save_packed(folder, config, lambda _, weight: compress(weight, weights, form), head=head)
    return folder


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_packed_head_of_its_own_is_kept(tmp_path: Path) -> None:
    checkpoint = open_folder(save(tmp_path, GROUP, PACKED, head=True))
    loading = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    assert (our_logits(checkpoint) - their_logits(tmp_path, **loading)).abs().max() < 2e-5
    store = source_store(checkpoint)
    assert store.formats[HEAD] == Format(4)
    assert list(rounded(checkpoint)) == [TABLE]


def test_a_packed_head_of_a_model_that_says_it_is_tied_is_refused(tmp_path: Path) -> None:
    save(tmp_path, GROUP, PACKED, head=True)
    configure(tmp_path, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is quantized, but"):
        open_folder(tmp_path)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(("weights", "form", "expected"), KEPT.values(), ids=list(KEPT))
def test_codes_are_kept_and_logits_are_those_of_transformers(
    tmp_path: Path, weights: dict[str, Any], form: str, expected: Format
) -> None:
    checkpoint = open_folder(save(tmp_path, weights, form))
    if form == PACKED:  # transformers also quantizes the activations of the others
        # transformers leaves packed zero points aside unless it dequantizes while loading
        loading = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        theirs = their_logits(tmp_path, **loading)
        assert (our_logits(checkpoint) - theirs).abs().max() < 2e-5
    store = source_store(checkpoint)
    assert store.formats[UP] == expected
    assert torch.equal(store.weight(UP).rows(0, 160), all_rows(checkpoint))
    assert list(rounded(checkpoint)) == [TABLE]


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_float8_is_dequantized_to_the_values_of_the_package(tmp_path: Path, strategy: str) -> None:
    weights = {**FLOAT8, "strategy": strategy}
    checkpoint = open_folder(save(tmp_path, weights, "float-quantized"))
    stored = load_file(tmp_path / "model.safetensors")
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    state = {p: stored[UP.replace("weight", p)] for p in ("weight", "weight_scale")}
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    expected = compressor.decompress(state, scheme)["weight"].float()
    torch.testing.assert_close(all_rows(checkpoint), expected)
    assert rounded(checkpoint)[UP] == "fp8 (F8_E4M3)"
    assert any("float8 weights are dequantized" in note for note in checkpoint.notes)
    assert any("also quantizes activations" in note for note in checkpoint.notes)


def test_groups_in_activation_order_are_read_in_that_order(tmp_path: Path) -> None:
    """As with GPTQ's desc_act, codes in this order fit none of our formats."""
    order = torch.randperm(128, generator=torch.Generator().manual_seed(5))
    group_of = torch.argsort(order) // 32

    def pack(_: str, weight: Tensor) -> dict[str, Tensor]:
        parts = compress(weight, GROUP, PACKED)
        return {**parts, "weight_g_idx": group_of.int()} if weight.shape[1] == 128 else parts

    save_packed(tmp_path, quantization({**GROUP, "actorder": "group"}, PACKED), pack)
    checkpoint = open_folder(tmp_path)
    save(tmp_path / "in-order", GROUP, PACKED)
    plain = open_folder(tmp_path / "in-order")
    scales = load_file(tmp_path / "model.safetensors")[UP.replace("weight", "weight_scale")]
    codes = all_rows(plain) / scales.repeat_interleave(32, 1)
    torch.testing.assert_close(all_rows(checkpoint), codes * scales[:, group_of])
    assert "groups out of order" in rounded(checkpoint)[UP]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized', expected one of"),
        ({"format": "marlin-24"}, "format is 'marlin-24', expected one of"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config rotates"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "has the format 'sparse-24"),
        ({"config_groups": {}}, "config_groups is {}"),
    ],
)
def test_other_kinds_are_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    save(tmp_path, GROUP, PACKED, **fields)
    with pytest.raises(ConfigError, match=message):
        open_folder(tmp_path)


def test_an_unsupported_number_of_bits_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {**GROUP, "num_bits": 3}, PACKED)
    with pytest.raises(ConfigError, match="num_bits is 3, expected 4 or 8"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_scale", None, r"up_proj\.weight_scale is missing"),
        ("weight_scale", torch.ones(160, 3), r"is F32 of shape \(160, 3\), expected one scale"),
        ("weight_scale", torch.ones(160, 4, dtype=torch.int32), "is I32"),
        ("weight_shape", torch.tensor([160, 96]), "expected 160 rows of 96 codes of 4 bits"),
        ("weight_shape", torch.tensor([-1, 128]), "expected -1 rows"),
        ("weight_packed", torch.zeros(160, 16, dtype=torch.uint8), "is U8"),
        ("weight_g_idx", torch.full((128,), 7), "names group 7, expected 0 to 3"),
    ],
)
def test_tensors_that_do_not_match_are_refused_by_name(
    tmp_path: Path, part: str, value: Tensor | None, message: str
) -> None:
    save(tmp_path, GROUP, PACKED)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(UP.replace("weight", part), None)
    save_file(tensors | ({UP.replace("weight", part): value} if value is not None else {}), path)
    with pytest.raises(CheckpointError, match=message):
        all_rows(open_folder(tmp_path))
