"""Codes and scales, read back from every container, are the store's: tensor by tensor."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from gemma_export.checkpoint.gguf import gguf_name
from gemma_export.quantize.pack import unpack
from gemma_export.quantize.recipe import Format, find_recipe
from gemma_export.quantize.store import QuantizedStore, open_or_build_store
from gemma_runtime.bundle import Bundle
from gemma_runtime.codes_gguf import read_gguf_codes
from gemma_runtime.errors import BundleError
from tests.export.conftest import Export, TinyCheckpoint
from tests.export.models import GEMMA2, GEMMA3, Tiny, save_tiny

# By Hugging Face's name: codes from 0 on, (N, K), and scales, (N, G).
Held = Mapping[str, tuple[NDArray[np.uint8], NDArray[np.float16]]]


def _with_head_scale(tiny: Tiny) -> Tiny:
    """Queries scaled by the head size, the one scale that llama.cpp knows."""
    config = copy.deepcopy(tiny.config)
    config.query_pre_attn_scalar = config.head_dim
    return replace(tiny, config=config)


TINIES = (_with_head_scale(GEMMA2), GEMMA3)


@pytest.fixture(scope="module", params=TINIES, ids=lambda tiny: tiny.name)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TinyCheckpoint:
    """The 160 inputs of down_proj are five groups: an odd number."""
    folder = tmp_path_factory.mktemp(request.param.name)
    return TinyCheckpoint(request.param, folder, save_tiny(request.param, folder))


def from_onnx(bundle: Bundle, store: QuantizedStore) -> Held:
    """Matrices that share an input lie below one another, as `A+B`."""
    model = onnx.load(bundle.directory / "model.onnx", load_external_data=False)
    tensors = {
        t.name: onnx.numpy_helper.to_array(t, str(bundle.directory))
        for t in model.graph.initializer
        if t.name.endswith((".codes", ".scales"))
    }
    held = {}
    for joined in (name.removesuffix(".codes") for name in tensors if name.endswith(".codes")):
        row = 0
        for name in joined.split("+"):
            rows = slice(row, row + store.shapes[name][0])
            packed = tensors[f"{joined}.codes"][rows].reshape(store.shapes[name][0], -1)
            held[name] = (nibbles(packed, store.formats[name]), tensors[f"{joined}.scales"][rows])
            row = rows.stop
    return held


def from_executorch(bundle: Bundle, store: QuantizedStore) -> Held:
    from gemma_export.targets.pte_file import open_pte

    held = {}
    with open_pte(bundle.directory / "model.pte") as pte:
        for name, (rows, width) in matrices(store).items():
            packed = np.frombuffer(bytes(pte.named_data(f"{name}.codes")), np.uint8)
            half = np.frombuffer(bytes(pte.named_data(f"{name}.scales")), np.uint16)
            scales = (half.astype(np.uint32) << 16).view(np.float32).reshape(rows, -1)
            codes = nibbles(packed.reshape(rows, width // 2), store.formats[name])
            held[name] = codes, scales.astype(np.float16)
    return held


def from_coreml(bundle: Bundle, store: QuantizedStore) -> Held:
    from gemma_runtime.mil.package import Package

    package = Package(bundle.directory / "model.mlpackage")
    found: dict[str, tuple[Any, Any]] = {}
    for function in package.functions.values():
        for operation in next(iter(function.block_specializations.values())).operations:
            if operation.type == "constexpr_blockwise_shift_scale":
                data, scale = (
                    package.value(operation.inputs[part].arguments[0].value)
                    if operation.inputs[part].arguments[0].WhichOneof("binding") == "value"
                    else package.value(operation.attributes[part])
                    for part in ("data", "scale")
                )
                found[operation.outputs[0].name] = data, scale
    held = {}
    for name, shape in matrices(store).items():
        data, scale = by_name(found, name)
        codes = (np.asarray(data).reshape(shape).astype(np.int16) + 8).astype(np.uint8)
        held[name] = codes, np.asarray(scale).reshape(shape[0], -1).astype(np.float16)
    return held


def by_name(found: Mapping[str, tuple[Any, Any]], name: str) -> tuple[Any, Any]:
    """MIL's names have underscores for what is no letter."""
    spelled = name.replace(".", "_")
    return next(value for key, value in found.items() if key.replace(".", "_").startswith(spelled))


def from_gguf(bundle: Bundle, store: QuantizedStore) -> Held:
    names = {gguf_name(name): name for name in store.formats}
    return {
        names[matrix.name]: (matrix.codes, matrix.scales)
        for matrix in read_gguf_codes(bundle.directory / "model.gguf")
    }


def matrices(store: QuantizedStore) -> dict[str, tuple[int, int]]:
    return {n: (shape[0], shape[1]) for n, shape in store.shapes.items() if len(shape) == 2}


def nibbles(packed: NDArray[np.uint8], form: Format) -> NDArray[np.uint8]:
    if form.bits == 8:
        return packed
    codes: NDArray[np.uint8] = np.stack((packed & 15, packed >> 4), -1).reshape(len(packed), -1)
    return codes


READERS: Mapping[str, tuple[str | None, Callable[[Bundle, QuantizedStore], Held]]] = {
    "onnx": (None, from_onnx),
    "executorch": ("executorch", from_executorch),
    "coreml": ("coremltools", from_coreml),
    "gguf": (None, from_gguf),
}


@pytest.mark.parametrize(
    ("target", "recipe"),
    [(target, "int4") for target in READERS] + [("onnx", "int8"), ("gguf", "int8")],
)
def test_every_container_holds_the_stores_codes(
    checkpoint: TinyCheckpoint, export: Export, target: str, recipe: str
) -> None:
    package, read = READERS[target]
    if package is not None:
        pytest.importorskip(package)
    bundle = export_small(export, checkpoint, target, recipe)
    store = open_or_build_store(checkpoint.open(), find_recipe(recipe))
    held = read(bundle, store)
    assert set(held) == set(matrices(store))
    for name, (rows, width) in matrices(store).items():
        part = store.weight(name).codes(0, rows)
        codes, scales = held[name]
        want = unpack(part.codes, store.formats[name].bits, width).numpy()
        assert np.array_equal(codes, want), name
        assert np.array_equal(scales, part.scales.numpy()), name


def export_small(export: Export, checkpoint: TinyCheckpoint, target: str, recipe: str) -> Bundle:
    context = 16 if target == "coreml" else 128  # its chunks are no longer than its rings
    return export(checkpoint.folder, recipe, context=context, target=target)


def test_a_cut_or_foreign_file_is_refused(
    checkpoint: TinyCheckpoint, export: Export, tmp_path: Path
) -> None:
    bundle = export(checkpoint.folder, "int4", target="gguf")
    content = (bundle.directory / "model.gguf").read_bytes()
    for damaged in (content[: len(content) // 2], content[:100], b"GGML" + content[4:]):
        (tmp_path / "bad.gguf").write_bytes(damaged)
        with pytest.raises(BundleError, match=r"ends inside|is no GGUF"):
            list(read_gguf_codes(tmp_path / "bad.gguf"))
