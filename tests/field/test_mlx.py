"""MLX folders: 4- and 8-bit codes with a scale and a bias per group."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_export.checkpoint.folder import open_folder
from gemma_export.formats.format import Format
from gemma_export.model.config import HEAD, TABLE
from gemma_runtime.errors import CheckpointError, ConfigError
from tests.field.packed_models import (
    UP,
    all_rows,
    our_logits,
    rounded,
    save_packed,
    source_store,
)


def quantize(weight: Tensor, bits: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """As `mx.quantize` does, in groups of 32, with the represented values as `expected`."""
    groups = weight.view(len(weight), -1, 32)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-7)
    scale = torch.where(low.abs() > high.abs(), scale, -scale)
    edge = torch.where(low.abs() > high.abs(), low, high)
    steps = (edge / scale).round()
    scale = torch.where(steps == 0, scale, edge / steps).to(dtype)
    bias = torch.where(steps == 0, 0, edge).to(dtype)
    scales, biases = scale.float()[..., None], bias.float()[..., None]
    codes = ((groups - biases) / scales).round().clamp(0, 2**bits - 1)
    words = torch.zeros(len(weight), weight.shape[1] * bits // 32, dtype=torch.int64)
    for index, column in enumerate(codes.view(len(weight), -1).long().unbind(1)):
        words[:, index * bits // 32] |= column << (index * bits % 32)
    return {
        "weight": words.to(torch.uint32),
        "scales": scale,
        "biases": bias,
        "expected": (codes * scales + biases).view_as(weight),
    }


def save(
    folder: Path, bits: int, dtype: torch.dtype, head: bool = False, /, **fields: Any
) -> dict[str, Tensor]:
    expected: dict[str, Tensor] = {}

    def pack(module: str, weight: Tensor) -> dict[str, Tensor]:
        parts = quantize(weight, bits, dtype)
        expected[f"{module}.weight"] = parts.pop("expected")
        return parts

    own = {"group_size": 32, "bits": bits, **fields}
    save_packed(folder, {"quantization": own, "quantization_config": own}, pack, True, head)
    return expected


def test_a_packed_head_of_its_own_is_read(tmp_path: Path) -> None:
    expected = save(tmp_path, 4, torch.float16, True)
    checkpoint = open_folder(tmp_path)
    assert not checkpoint.config.tied
    for name in (TABLE, HEAD):
        torch.testing.assert_close(all_rows(checkpoint, name), expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_are_those_of_mlx_with_the_table(
    tmp_path: Path, bits: int, dtype: torch.dtype
) -> None:
    expected = save(tmp_path, bits, dtype)
    checkpoint = open_folder(tmp_path)
    assert TABLE in expected
    for name, values in expected.items():
        torch.testing.assert_close(all_rows(checkpoint, name), values, rtol=0, atol=1e-6)
    assert our_logits(checkpoint).isfinite().all()


def test_codes_with_whole_zero_points_are_kept_exactly(tmp_path: Path) -> None:
    save(tmp_path, 4, torch.float32)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(".scales")]:
        tensors[name] = tensors[name].half().float()
        biases = name.replace(".scales", ".biases")
        tensors[biases] = tensors[name] * (tensors[biases] / tensors[name]).round().clamp(-15, 0)
    save_file(tensors, path)
    checkpoint = open_folder(tmp_path)
    store = source_store(checkpoint)
    assert store.formats[UP] == Format(4, 32, True)
    assert torch.equal(store.weight(UP).rows(0, 160), all_rows(checkpoint))
    assert rounded(checkpoint) == {}


def test_codes_with_nearly_whole_zero_points_are_kept_with_a_note(tmp_path: Path) -> None:
    from gemma_export.quantize.kept import resolve_recipe
    from gemma_export.quantize.recipe import find_recipe

    save(tmp_path, 4, torch.float16)
    checkpoint = open_folder(tmp_path)
    resolved = resolve_recipe(find_recipe("source"), checkpoint)
    assert any("codes kept, biases rounded to whole zero" in note for note in resolved.notes)
    assert UP in resolved.rounded
    weight = source_store(checkpoint).weight(UP).rows(0, 160)
    step = load_file(tmp_path / "model.safetensors")[UP.replace("weight", "scales")].abs().max()
    assert (weight - all_rows(checkpoint)).abs().max() < float(step) / 8


def test_a_module_may_have_other_bits_or_stay_in_floats(tmp_path: Path) -> None:
    module = UP.removesuffix(".weight")
    save(tmp_path, 4, torch.float16, **{module: {"group_size": 32, "bits": 8}})
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(2)
    parts = quantize(torch.randn(160, 128, generator=generator), 8, torch.float16)
    expected = parts.pop("expected")
    save_file(tensors | {f"{module}.{part}": value for part, value in parts.items()}, path)
    torch.testing.assert_close(all_rows(open_folder(tmp_path)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {UP.removesuffix(".weight"): {"bits": 6}},
            "bits 6 and group_size 32, expected affine, 4 or 8 bits",
        ),
        ({"mode": "mxfp4"}, "has the mode 'mxfp4'"),
        ({"group_size": 0}, "group_size 0"),
    ],
)
def test_other_kinds_are_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], match: str
) -> None:
    save(tmp_path, 4, torch.float16, **fields)
    with pytest.raises(ConfigError, match=match):
        open_folder(tmp_path)


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_a_missing_or_misshapen_part_is_refused_by_name(tmp_path: Path, part: str) -> None:
    save(tmp_path, 4, torch.float16)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = UP.replace("weight", part)
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"up_proj\.\w+ is \w+ of shape"):
        open_folder(tmp_path)
