"""Rarer forms of packed weights: bytes stored as floats, and one group per row."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma_export.checkpoint.folder import open_folder
from gemma_export.formats.format import Format
from gemma_export.quantize.kept import resolve_recipe
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.store import open_or_build_store
from tests.export.checkpoint.test_prequantized import awq, gptq, nf4, quantized_folder


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bitsandbytes_bytes_may_be_stored_as_floats(tmp_path: Path, storage: torch.dtype) -> None:
    """`bnb_4bit_quant_storage`: FSDP needs the dtype of the other weights."""

    def pack(weight: Tensor) -> dict[str, Any]:
        parts = nf4(weight, nested=True)
        return {**parts, "weight": parts["weight"].flatten().view(storage).view(-1, 1)}

    expected = quantized_folder(tmp_path, {"quant_method": "bitsandbytes"}, pack)
    checkpoint = open_folder(tmp_path)
    for name, values in expected.items():
        cuts = (0, 1, 14, len(values))
        rows = [checkpoint.rows(name, a, b) for a, b in pairwise(cuts)]
        torch.testing.assert_close(torch.cat(rows), values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_one_group_per_row_is_kept_with_repeated_scales(tmp_path: Path, method: str) -> None:
    """A group of 160 fits no kernel; the same scale in groups of 32 gives the same weights."""

    def pack(weight: Tensor) -> dict[str, Any]:
        own = {**config, "group_size": weight.shape[1]}
        return gptq(weight, own, None) if method == "gptq" else awq(weight, own)

    config = {"quant_method": method, "bits": 4, "group_size": -1, "sym": True}
    expected = quantized_folder(tmp_path, config, pack)
    checkpoint = open_folder(tmp_path)
    recipe = resolve_recipe(find_recipe("source"), checkpoint).recipe
    store = open_or_build_store(checkpoint, recipe)
    for name, values in expected.items():
        group = {128: 128, 160: 32}[values.shape[1]]
        assert store.formats[name] == Format(4, group, asymmetric=method == "awq")
        kept = store.weight(name).rows(0, len(values))
        torch.testing.assert_close(kept, values, rtol=0, atol=1e-6)
