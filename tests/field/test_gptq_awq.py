"""GPTQ and AWQ folders of every tool: configs beside the weights, overrides, auto-round."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_export.checkpoint.folder import open_folder
from gemma_export.formats.format import INT4_ASYM, Format
from gemma_export.model.config import HEAD
from gemma_runtime.errors import CheckpointError, ConfigError
from tests.export.checkpoint.test_prequantized import awq, gptq
from tests.field.packed_models import UP, all_rows, rounded, save_packed, source_store

GPTQ = {"bits": 4, "group_size": 32, "sym": False, "desc_act": False}
AWQ = {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
DOWN = UP.replace("up_proj", "down_proj")
Expected = dict[str, Tensor]


def save(
    folder: Path, fields: Mapping[str, Any], kind: Any = gptq, head: bool = False, /, **bits: int
) -> Expected:
    """A tiny Gemma in a tool's packing; the modules named in `bits` have others. 0 is unpacked."""
    expected: Expected = {}

    def pack(module: str, weight: Tensor) -> dict[str, Tensor]:
        own = next((b for part, b in bits.items() if part in module), 4)
        if own == 0:
            return {"weight": weight}
        config = {**GPTQ, "bits": own}
        parts = awq(weight, AWQ) if kind is awq else gptq(weight, config, None)
        expected[f"{module}.weight"] = parts.pop("expected")
        return parts

    save_packed(folder, fields, pack, head=head)
    return expected


def check(folder: Path, expected: Expected, up: Format = INT4_ASYM) -> None:
    """Every matrix has the expected values, and `--quant source` keeps them."""
    checkpoint = open_folder(folder)
    store = source_store(checkpoint)
    assert store.formats[UP] == up
    for name, values in expected.items():
        torch.testing.assert_close(all_rows(checkpoint, name), values, rtol=0, atol=1e-6)
        assert torch.equal(store.weight(name).rows(0, len(values)), all_rows(checkpoint, name))
        assert name not in rounded(checkpoint)


def method(name: str, **fields: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": name, **GPTQ, **fields}}


@pytest.mark.parametrize("kind", [gptq, awq], ids=["gptq", "awq"])
def test_a_packed_head_of_its_own_is_kept(tmp_path: Path, kind: Any) -> None:
    """GPTQModel packs it if `lm_head` is true."""
    fields = method("gptq", lm_head=True) if kind is gptq else {"quantization_config": {
        "quant_method": "awq", **AWQ}}  # fmt: skip
    expected = save(tmp_path, fields, kind, True)
    assert HEAD in expected
    check(tmp_path, expected)


def test_a_config_beside_the_weights_is_used(tmp_path: Path) -> None:
    """AutoGPTQ before 0.5 wrote quantize_config.json and left config.json alone."""
    expected = save(tmp_path, {})
    (tmp_path / "quantize_config.json").write_text(json.dumps(GPTQ))
    check(tmp_path, expected)
    first = open_folder(tmp_path).digest()
    second = {**GPTQ, "checkpoint_format": "gptq_v2"}
    (tmp_path / "quantize_config.json").write_text(json.dumps(second))
    assert open_folder(tmp_path).digest() != first  # other zero points: another model


def test_awq_with_its_older_keys_in_a_file_of_its_own_is_read(tmp_path: Path) -> None:
    expected = save(tmp_path, {}, awq)
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(old))
    check(tmp_path, expected)


def test_awq_with_its_older_keys_in_config_json_is_read(tmp_path: Path) -> None:
    old = {"quant_method": "awq", "zero_point": True, "q_group_size": 32, "w_bit": 4}
    check(tmp_path, save(tmp_path, {"quantization_config": old}, awq))


def test_a_damaged_config_beside_the_weights_is_named(tmp_path: Path) -> None:
    save(tmp_path, {})
    (tmp_path / "quantize_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"quantize_config\.json is not valid JSON"):
        open_folder(tmp_path)


def test_overrides_and_exclusions_of_gptqmodel_are_followed(tmp_path: Path) -> None:
    dynamic = {
        r"-:.*\.v_proj": {},
        r"+:.*layers\.0\.mlp\.up_proj$": {"bits": 8, "group_size": 32},
        r".*\.down_proj": {"bits": 8},
    }
    bits = {"v_proj": 0, "layers.0.mlp.up_proj": 8, "down_proj": 8}
    expected = save(tmp_path, method("gptq", dynamic=dynamic), **bits)
    check(tmp_path, expected, Format(8, 32, True))
    checkpoint = open_folder(tmp_path)
    assert rounded(checkpoint)["model.layers.1.self_attn.v_proj.weight"] == "float32"
    assert source_store(checkpoint).formats[DOWN] == Format(8, 32, True)


@pytest.mark.parametrize(
    ("dynamic", "error", "match"),
    [
        ({"-:.*up_proj": {}}, ConfigError, r"dynamic excludes model\.layers\.0\.mlp\.up_proj"),
        ({".*up_proj": {"bits": 8}}, CheckpointError, r"up_proj\.\w+ is .*, expected"),
        ({".*up_proj": {"bits": 3}}, ConfigError, "bits is 3, expected 4 or 8"),
        ({"(": {}}, ConfigError, "is not a regular expression"),
        ({".*": 4}, ConfigError, "is 4, expected an object"),
        ([1], ConfigError, r"dynamic is \[1\], expected an object"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(
    tmp_path: Path, dynamic: Any, error: type[Exception], match: str
) -> None:
    save(tmp_path, method("gptq", dynamic=dynamic))
    with pytest.raises(error, match=match):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["auto-round", "intel/auto-round"])
@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round:auto_awq", "auto_round"])
def test_the_packings_of_auto_round_are_read(tmp_path: Path, name: str, packing: str) -> None:
    extra = {"model.layers.0.mlp.up_proj": {"bits": 8}} if "gptq" in packing else {}
    fields = method(name, packing_format=packing, extra_config=extra)
    bits = {"layers.0.mlp.up_proj": 8} if extra else {}
    expected = save(tmp_path, fields, awq if "awq" in packing else gptq, **bits)
    if packing == "auto_round":  # stores zero points as they are, not less one
        raise_zero_points(tmp_path)
    check(tmp_path, expected, Format(8 if extra else 4, 32, True))


def raise_zero_points(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    ones = 0x11111111  # no nibble overflows: the zero points are 1 to 15
    changed = {n: t + ones if n.endswith("qzeros") else t for n, t in tensors.items()}
    save_file(changed, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (method("auto-round", packing_format="auto_round:llm_compressor"), "packing_format is"),
        (method("gptq", checkpoint_format="marlin"), "checkpoint_format is 'marlin', expected"),
        (method("awq", version="gemv"), "version is 'gemv', expected gemm"),
        (method("awq", backend="llm-awq"), "backend is 'llm-awq', expected autoawq"),
        (method("hqq"), r"already quantized \(hqq\), expected one of gptq, awq"),
        (method("aqlm"), r"already quantized \(aqlm\)"),
        ({"quantization_config": [1]}, "quantization_config is .*, expected an object"),
    ],
)
def test_other_layouts_and_methods_are_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], match: str
) -> None:
    save(tmp_path, fields)
    with pytest.raises(ConfigError, match=match):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("qzeros", None, r"up_proj\.qzeros is missing beside"),
        ("qweight", torch.zeros(16, 160), "qweight is F32 of shape"),
        ("scales", torch.ones(4, 159), r"scales is F32 of shape \(4, 159\), expected"),
        ("g_idx", torch.full((128,), -1, dtype=torch.int32), "names group -1, expected 0 to 3"),
        ("g_idx", torch.zeros(3, dtype=torch.int32), r"g_idx is I32 of shape \(3,\)"),
    ],
)
def test_damaged_tensors_are_refused_by_name(
    tmp_path: Path, part: str, value: Tensor | None, match: str
) -> None:
    save(tmp_path, method("gptq"))
    tensors = load_file(tmp_path / "model.safetensors")
    name = UP.replace("weight", part)
    tensors.pop(name)
    save_file(tensors | ({} if value is None else {name: value}), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=match):
        all_rows(open_folder(tmp_path))


def test_null_is_no_quantization(tmp_path: Path) -> None:
    save(tmp_path, {"quantization_config": None}, **{"_proj": 0})
    assert open_folder(tmp_path).notes == ()
