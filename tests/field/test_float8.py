"""Float8 folders (`quant_method: fp8`): dequantized to the values of transformers, with a note."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from gemma_export.checkpoint.folder import open_folder
from gemma_runtime.errors import CheckpointError
from tests.field.packed_models import UP, all_rows, our_logits, rounded, save_packed

FP8 = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}


def pack(weight: Tensor, blocks: tuple[int, int], name: str) -> dict[str, Tensor]:
    rows, inputs = weight.shape[0] // blocks[0], weight.shape[1] // blocks[1]
    tiles = weight.view(blocks[0], rows, blocks[1], inputs)
    scales = tiles.abs().amax((1, 3)) / 448
    stored = (tiles / scales[:, None, :, None]).view_as(weight).to(torch.float8_e4m3fn)
    return {"weight": stored, name: scales}


def save(folder: Path, blocks: tuple[int, int], name: str, **fields: Any) -> Path:
    config = {"quantization_config": {**FP8["quantization_config"], **fields}}
    save_packed(folder, config, lambda _, weight: pack(weight, blocks, name))
    return folder


@pytest.mark.parametrize("blocks", [(1, 1), (32, 1), (2, 4)], ids=["tensor", "rows", "blocks"])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_values_are_those_of_transformers(
    tmp_path: Path, blocks: tuple[int, int], name: str
) -> None:
    checkpoint = open_folder(save(tmp_path, blocks, name))
    tensors = load_file(tmp_path / "model.safetensors")
    scales = tensors[UP.replace("weight", name)]
    expected = Fp8Dequantize(None)._dequantize_one(tensors[UP], scales)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(all_rows(checkpoint), expected)
    assert our_logits(checkpoint).isfinite().all()
    assert rounded(checkpoint)[UP] == "fp8 (F8_E4M3)"
    assert any("float8 weights are dequantized" in note for note in checkpoint.notes)


def test_blocks_that_do_not_divide_the_matrix_follow_the_config(tmp_path: Path) -> None:
    save(tmp_path, (1, 1), "weight_scale_inv", weight_block_size=[128, 128])
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors[UP.replace("weight", "weight_scale_inv")] = torch.tensor([[1.0], [2.0]])
    save_file(tensors, path)
    expected = tensors[UP].float()  # 160 rows: blocks of 128 and 32
    expected[128:] *= 2
    assert torch.equal(all_rows(open_folder(tmp_path)), expected)


@pytest.mark.parametrize(
    ("scales", "match"),
    [
        (torch.ones(3, 5), r"weight_scale is F32 of shape \(3, 5\), expected one scale per"),
        (torch.ones(1, 1, 2), "expected one scale per tensor, row or block"),
        (torch.ones(1, dtype=torch.int32), "weight_scale is I32"),
    ],
)
def test_scales_that_do_not_fit_are_refused(tmp_path: Path, scales: Tensor, match: str) -> None:
    save(tmp_path, (1, 1), "weight_scale")
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {UP.replace("weight", "weight_scale"): scales}, path)
    with pytest.raises(CheckpointError, match=match):
        open_folder(tmp_path)


def test_float8_without_scales_is_refused(tmp_path: Path) -> None:
    save_packed(tmp_path, {}, lambda _, weight: {"weight": weight.to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match="is F8_E4M3, expected one of F32, F16, BF16"):
        open_folder(tmp_path)
