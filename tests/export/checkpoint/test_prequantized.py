"""Already quantized checkpoints: their codes are kept unchanged if our formats can hold them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_export.checkpoint import prequantized
from gemma_export.checkpoint.folder import open_folder
from gemma_export.checkpoint.gguf import GgufCheckpoint, open_gguf
from gemma_export.checkpoint.grid import grid_codes
from gemma_export.formats.codes import dequantize
from gemma_export.formats.format import INT4, Format
from gemma_export.formats.gguf_file import read_blocks, read_header
from gemma_export.model.config import TABLE
from gemma_export.pipeline import ExportRequest, export_bundles
from gemma_export.progress import QuietReporter
from gemma_export.quantize.kept import require_exact, resolve_recipe
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.store import QuantizedStore, open_or_build_store
from gemma_runtime.bundle import Bundle
from gemma_runtime.contents.gguf_names import gguf_name
from gemma_runtime.errors import CheckpointError, ConfigError, TargetError
from gemma_runtime.proof.verify import Verdict, verify_bundle
from tests.export.gguf_files import GEMMA2, GEMMA3, write_tiny
from tests.export.models import GEMMA3 as TINY_GEMMA3
from tests.export.models import save_tiny

KINDS = {name: GGMLQuantizationType[name] for name in ("Q4_0", "Q5_0", "Q8_0", "Q6_K", "Q4_K")}
UP = "model.layers.0.mlp.up_proj.weight"


def build(checkpoint: Any) -> QuantizedStore:
    return open_or_build_store(checkpoint, resolve_recipe(find_recipe("source"), checkpoint).recipe)


def export(folder: Path, source: Path, *targets: str, exact: bool = True) -> dict[str, Bundle]:
    request = ExportRequest(
        targets=targets,
        recipe=find_recipe("source"),
        checkpoint=str(source),
        context_length=64,
        prefill_length=16,
        output=folder / "out",
        require_exact=exact,
    )
    results = export_bundles(request, QuietReporter())
    return {result.bundle.manifest.target.name: result.bundle for result in results}


# GGUF


@pytest.mark.parametrize(
    ("kind", "fmt"), [("Q4_0", Format(4)), ("Q5_0", Format(8)), ("Q8_0", Format(8))]
)
def test_kept_ggml_codes_give_exactly_the_same_weights(
    tmp_path: Path, kind: str, fmt: Format
) -> None:
    checkpoint = open_gguf(write_tiny(tmp_path, GEMMA3, KINDS[kind]))
    store = build(checkpoint)
    for name in (UP, TABLE):
        assert store.formats[name] == fmt
        rows = store.shapes[name][0]
        assert torch.equal(store.weight(name).rows(0, rows), checkpoint.rows(name, 0, rows))
    require_exact(resolve_recipe(find_recipe("source"), checkpoint))


def test_q6_k_keeps_its_codes_and_a_note_says_that_scales_are_rounded(tmp_path: Path) -> None:
    checkpoint = open_gguf(write_tiny(tmp_path, GEMMA3, KINDS["Q6_K"]))
    resolved = resolve_recipe(find_recipe("source"), checkpoint)
    weight = build(checkpoint).weight(UP)
    assert weight.format == Format(8, 16)
    expected = checkpoint.rows(UP, 0, 512)
    torch.testing.assert_close(weight.rows(0, 512), expected, rtol=2**-11, atol=1e-7)
    assert any(note.startswith("codes kept, scales rounded") for note in resolved.notes)
    with pytest.raises(
        CheckpointError, match=r"rounded again: model\.embed_tokens\.weight \(Q6_K\)"
    ):
        require_exact(resolved)


def test_k_quants_that_fit_no_format_of_ours_are_rounded_and_named(tmp_path: Path) -> None:
    checkpoint = open_gguf(write_tiny(tmp_path, GEMMA3, KINDS["Q4_K"]))
    resolved = resolve_recipe(find_recipe("source"), checkpoint)
    assert resolved.recipe.rule(UP).format == Format(8)
    with pytest.raises(CheckpointError, match=r"50 tensors .*Q4_K\).* and 46 more; --quant source"):
        require_exact(resolved)


def test_a_note_warns_if_a_recipe_rounds_quantized_weights_again(tmp_path: Path) -> None:
    checkpoint = open_gguf(write_tiny(tmp_path, GEMMA3, KINDS["Q4_0"]))
    resolved = resolve_recipe(find_recipe("int4"), checkpoint)
    assert resolved.notes == (
        "this recipe rounds the checkpoint's quantized weights (50 Q4_0) again; "
        "--quant source keeps them",
    )
    with pytest.raises(CheckpointError, match="50 tensors would be rounded again"):
        require_exact(resolved)
    exact = resolve_recipe(find_recipe("none"), checkpoint)
    require_exact(exact)
    assert exact.notes == ()


@pytest.mark.parametrize("hf", [GEMMA2, GEMMA3], ids=["gemma2", "gemma3"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_a_gguf_export_of_ggml_blocks_has_the_same_bytes(
    tmp_path: Path, hf: Any, kind: str
) -> None:
    source = write_tiny(tmp_path, hf, KINDS[kind])
    written = export(tmp_path, source, "gguf")["gguf"].directory / "model.gguf"
    assert tensor_bytes(written) == tensor_bytes(source)


def tensor_bytes(path: Path) -> dict[str, bytes]:
    return {
        name: read_blocks(path, tensor, 0, tensor.shape[0]).tobytes()
        for name, tensor in read_header(path).tensors.items()
        if len(tensor.shape) == 2
    }


def test_negative_scales_run_in_onnx(tmp_path: Path) -> None:
    source = write_tiny(tmp_path, GEMMA3, KINDS["Q4_0"])
    scales = build(open_gguf(source)).weight(UP).codes(0, 512).scales
    assert (scales < 0).any()
    bundle = export(tmp_path, source, "onnx")["onnx"]
    verification = verify_bundle(bundle)
    assert verification.verdict is Verdict.PASS
    assert verification.exact is not None
    assert verification.exact.mean_kl < 1e-8


def test_negative_scales_run_in_coreml(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    source = write_tiny(tmp_path, GEMMA3, KINDS["Q4_0"])
    assert verify_bundle(export(tmp_path, source, "coreml")["coreml"]).verdict is Verdict.PASS


def test_xnnpack_refuses_negative_scales(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    source = write_tiny(tmp_path, GEMMA3, KINDS["Q4_0"])
    with pytest.raises(TargetError, match=r"can't store the scales of model\.\S+ exactly: XNNPACK"):
        export(tmp_path, source, "executorch")


# Float checkpoints whose weights lie on a quantization grid (quantization-aware training)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    spread=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_float_weights_on_the_grid_are_recognized_and_reproduced_exactly(
    seed: int, dtype: torch.dtype, spread: float
) -> None:
    values = on_grid(seed, spread).to(dtype).float()
    codes = grid_codes(values, dtype)
    assert codes is not None
    assert torch.equal(dequantize(codes, INT4).to(dtype).float(), values)


def on_grid(seed: int, spread: float) -> Tensor:
    """Random weights rounded as ggml's Q4_0 does, with one group of zeros."""
    values = np.random.default_rng(seed).standard_normal((4, 128), np.float32) * np.float32(spread)
    values[1, 32:64] = 0
    blocks = quantize(values, KINDS["Q4_0"]).reshape(4, 4, 18)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1).astype(np.float32)
    return torch.from_numpy((scales * (codes - 8)).reshape(4, 128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_not_on_the_grid_if_one_of_them_is_not(dtype: torch.dtype) -> None:
    values = on_grid(3, 1.0).to(dtype).float()
    values[2, 70] *= 1 + 2**-6
    assert grid_codes(values.to(dtype).float(), dtype) is None
    random = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    assert grid_codes(random.to(dtype).float(), dtype) is None


def test_a_folder_with_weights_on_the_grid_is_exported_exactly(tmp_path: Path) -> None:
    folder = tmp_path / "qat"
    save_tiny(TINY_GEMMA3, folder)
    change_weights(folder, lambda name, w: round_to_grid(w).bfloat16() if w.ndim == 2 else w)
    checkpoint = open_folder(folder)
    resolved = resolve_recipe(find_recipe("source"), checkpoint)
    require_exact(resolved)
    assert resolved.notes == ("codes kept: 50 bfloat16 on the Q4_0 grid",)
    weight = build(checkpoint).weight(UP)
    assert torch.equal(weight.rows(0, 160).bfloat16().float(), checkpoint.rows(UP, 0, 160))


def test_weights_are_read_once_to_find_out_that_they_are_on_the_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(TINY_GEMMA3, tmp_path)
    change_weights(tmp_path, lambda name, w: round_to_grid(w).bfloat16() if w.ndim == 2 else w)
    checkpoint, tested = open_folder(tmp_path), []

    def count(values: Tensor, dtype: torch.dtype) -> object:
        tested.append(values)
        return grid_codes(values, dtype)

    monkeypatch.setattr(prequantized, "grid_codes", count)
    require_exact(resolve_recipe(find_recipe("source"), checkpoint))
    once = len(tested)
    assert once >= 100  # a few rows of each of 50 matrices, then all
    assert len(resolve_recipe(find_recipe("int8"), checkpoint).rounded) == 50
    assert len(tested) == once


def round_to_grid(weight: Tensor) -> Tensor:
    groups = weight.float().view(-1, 32)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (largest / -8).half().float()
    return (scale * (groups / scale).round().clamp(-8, 7)).view_as(weight)


def change_weights(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({name: change(name, tensor) for name, tensor in tensors.items()}, path)


# GPTQ, AWQ and bitsandbytes. The tests pack them element by element, in the libraries' own layouts.


def gptq(weight: Tensor, config: Mapping[str, Any], order: Sequence[int] | None) -> dict[str, Any]:
    """(N, K) → the four tensors of AutoGPTQ's layer, and the weight that they represent."""
    rows, inputs = weight.shape
    bits, group = config["bits"], config["group_size"]
    groups_of = np.arange(inputs) // group if order is None else np.argsort(order) // group
    scales, zeros = affine(weight.numpy(), groups_of, bits, config["sym"])
    codes = np.clip(np.rint(weight.numpy() / scales[:, groups_of]) + zeros[:, groups_of], 0,
                    2**bits - 1).astype(np.uint32)  # fmt: skip
    words = np.zeros((inputs * bits // 32, rows), np.uint32)
    for k in range(inputs):
        words[k * bits // 32] |= codes[:, k] << np.uint32(k * bits % 32)
    zero_words = np.zeros((scales.shape[1], rows * bits // 32), np.uint32)
    for n in range(rows):
        stored = (zeros[n].astype(np.int64) - 1) & (2**bits - 1)
        zero_words[:, n * bits // 32] |= (stored << (n * bits % 32)).astype(np.uint32)
    return {
        "qweight": torch.from_numpy(words.view(np.int32)),
        "qzeros": torch.from_numpy(zero_words.view(np.int32)),
        "scales": torch.from_numpy(scales.T.copy()).half(),
        "g_idx": torch.from_numpy(groups_of.astype(np.int32)),
        "expected": torch.from_numpy(scales[:, groups_of] * (codes - zeros[:, groups_of])).float(),
    }


def awq(weight: Tensor, config: Mapping[str, Any]) -> dict[str, Any]:
    rows, inputs = weight.shape
    groups_of = np.arange(inputs) // config["group_size"]
    scales, zeros = affine(weight.numpy(), groups_of, 4, False)
    codes = np.clip(np.rint(weight.numpy() / scales[:, groups_of]) + zeros[:, groups_of], 0, 15)

    def words(columns: NDArray[np.generic]) -> Tensor:
        packed = np.zeros((columns.shape[0], rows // 8), np.uint32)
        for word in range(rows // 8):
            for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                packed[:, word] |= columns[:, word * 8 + column].astype(np.uint32) << (4 * nibble)
        return torch.from_numpy(packed.view(np.int32))

    return {
        "qweight": words(codes.T),
        "qzeros": words(zeros.T),
        "scales": torch.from_numpy(scales.T.copy()).half(),
        "expected": torch.from_numpy(scales[:, groups_of] * (codes - zeros[:, groups_of])).float(),
    }


def affine(
    weight: NDArray[np.float32], groups_of: NDArray[np.int64], bits: int, is_symmetric: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scales, rounded to float16, and zero points, at least 1: both (N, G)."""
    count = int(groups_of.max()) + 1
    groups = [weight[:, groups_of == index] for index in range(count)]
    low = np.stack([group.min(1) for group in groups], 1)
    high = np.stack([group.max(1) for group in groups], 1)
    if is_symmetric:
        scales = np.maximum(-low, high) / (2 ** (bits - 1) - 1)
        zeros = np.full(scales.shape, 2.0 ** (bits - 1))
    else:
        scales = (high - low) / (2**bits - 1)
        zeros = np.clip(np.rint(-low / scales), 1, 2**bits - 1)
    return scales.astype(np.float16).astype(np.float64), zeros.astype(np.float64)


def quantized_folder(folder: Path, config: Mapping[str, Any], pack: Any) -> dict[str, Tensor]:
    """Write a tiny Gemma with packed projections; returns the weights that they represent."""
    save_tiny(TINY_GEMMA3, folder)
    path = folder / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, tensor in load_file(path).items():
        if "_proj" in name:
            parts = pack(tensor)
            expected[name] = parts.pop("expected")
            module = name.removesuffix(".weight")
            tensors |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, path)
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf, "quantization_config": dict(config)}))
    return expected


CASES = {
    "gptq-sym": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}, Format(4)),
    "gptq-asym": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False},
        Format(4, 32, True),
    ),
    "gptq-int8": ({"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True}, Format(8)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32}, Format(4, 32, True)),
}


@pytest.mark.parametrize(("config", "fmt"), CASES.values(), ids=list(CASES))
def test_packed_codes_are_kept(tmp_path: Path, config: dict[str, Any], fmt: Format) -> None:
    folder = tmp_path / "packed"
    method = config["quant_method"]
    expected = quantized_folder(
        folder, config, lambda w: awq(w, config) if method == "awq" else gptq(w, config, None)
    )
    checkpoint = open_folder(folder)
    store = build(checkpoint)
    for name, values in expected.items():
        rows = len(values)
        assert store.formats[name] == fmt
        torch.testing.assert_close(checkpoint.rows(name, 0, rows), values, rtol=0, atol=1e-6)
        assert torch.equal(store.weight(name).rows(0, rows), checkpoint.rows(name, 0, rows))
    assert list(resolve_recipe(find_recipe("source"), checkpoint).rounded) == [TABLE]
    assert verify_bundle(export(tmp_path, folder, "onnx", exact=False)["onnx"]).verdict is (
        Verdict.PASS
    )


def test_gptq_with_desc_act_is_rounded_again_and_named(tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True}

    def pack(weight: Tensor) -> dict[str, Any]:
        order = np.random.default_rng(2).permutation(weight.shape[1])
        return gptq(weight, config, order.tolist())

    expected = quantized_folder(tmp_path, config, pack)
    checkpoint = open_folder(tmp_path)
    torch.testing.assert_close(checkpoint.rows(UP, 0, 160), expected[UP], rtol=0, atol=1e-6)
    resolved = resolve_recipe(find_recipe("source"), checkpoint)
    assert resolved.rounded[UP] == "gptq int4 with desc_act (groups out of order)"
    with pytest.raises(CheckpointError, match=r"desc_act \(groups out of order\)"):
        require_exact(resolved)


NF4 = torch.tensor(np.linspace(-1, 1, 16) ** 3, dtype=torch.float32)  # any table works


def nf4(weight: Tensor, nested: bool) -> dict[str, Any]:
    flat = weight.flatten().view(-1, 64)
    absmax = flat.abs().amax(-1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "shape": list(weight.shape)}
    parts: dict[str, Any] = {"weight.quant_map": NF4.clone()}
    if nested:
        table, offset = torch.linspace(-1, 1, 256), float(absmax.mean())
        outer = torch.full((-(-len(absmax) // 256),), float((absmax - offset).abs().max()))
        index = ((absmax - offset) / outer[0]).sub(table[:, None]).abs().argmin(0)
        absmax = table[index] * outer[0] + offset
        parts |= {"weight.absmax": index.to(torch.uint8), "weight.nested_absmax": outer}
        parts["weight.nested_quant_map"] = table
        state |= {"nested_blocksize": 256, "nested_offset": offset}
    else:
        parts["weight.absmax"] = absmax
    codes = (flat / absmax[:, None])[..., None].sub(NF4).abs().argmin(-1)
    pairs = codes.view(-1, 2)
    packed = ((pairs[:, 0] << 4) | pairs[:, 1]).to(torch.uint8)
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        **parts,
        "weight": packed[:, None],
        "weight.quant_state.bitsandbytes__nf4": text,
        "expected": (NF4[codes] * absmax[:, None]).view_as(weight),
    }


def int8_rows(weight: Tensor) -> dict[str, Any]:
    scales = weight.abs().amax(-1)
    steps = (weight / scales[:, None] * 127).round().to(torch.int8)
    expected = steps.float() * (scales / 127)[:, None]
    return {
        "weight": steps,
        "SCB": scales,
        "expected": expected,
        "weight_format": torch.zeros((), dtype=torch.uint8),
    }


BITSANDBYTES = {
    "nf4": lambda w: nf4(w, False),
    "nf4-nested": lambda w: nf4(w, True),
    "int8": int8_rows,
}


@pytest.mark.parametrize("pack", BITSANDBYTES.values(), ids=list(BITSANDBYTES))
def test_bitsandbytes_is_rounded_again_with_a_note(tmp_path: Path, pack: Any) -> None:
    expected = quantized_folder(tmp_path, {"quant_method": "bitsandbytes"}, pack)
    checkpoint = open_folder(tmp_path)
    assert any("(nf4, or int8 per row) is not one of ours" in note for note in checkpoint.notes)
    for name, values in expected.items():
        rows = torch.cat([checkpoint.rows(name, 0, 16), checkpoint.rows(name, 16, len(values))])
        torch.testing.assert_close(rows, values, rtol=0, atol=1e-6)
    with pytest.raises(CheckpointError, match=r"bitsandbytes (nf4|int8)\)"):
        require_exact(resolve_recipe(find_recipe("source"), checkpoint))


def test_gptq_with_an_unsupported_number_of_bits_is_refused(tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    quantized_folder(tmp_path, {**config, "bits": 3}, lambda w: gptq(w, config, None))
    with pytest.raises(ConfigError, match="bits is 3, expected 4 or 8"):
        open_folder(tmp_path)


@pytest.mark.real
def test_the_demo_keeps_the_codes_that_fit_and_names_the_other_types() -> None:
    from gemma_export.checkpoint.packaged import find_demo_gguf

    checkpoint: GgufCheckpoint = open_gguf(find_demo_gguf())
    resolved = resolve_recipe(find_recipe("source"), checkpoint)
    assert set(resolved.rounded.values()) == {"Q4_K", "Q6_K"}
    assert resolved.recipe.rule(TABLE).format == Format(8)
    kept = next(n for n in resolved.notes if n.startswith("codes kept: "))
    assert "Q5_0" in kept
    assert gguf_name(TABLE) == "token_embd.weight"
