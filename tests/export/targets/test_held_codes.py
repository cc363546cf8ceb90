"""The codes read back from a bundle of each target are those of the store."""

from pathlib import Path
from shutil import copytree

import pytest

from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.store import open_or_build_store
from gemma_runtime.bundle import Bundle
from gemma_runtime.contents.codes_gguf import read_gguf_codes
from gemma_runtime.contents.held_codes import codes_digest
from gemma_runtime.contents.inspection import compare_bundles
from gemma_runtime.errors import BundleError
from tests.export.conftest import Export, TinyCheckpoint, saved
from tests.export.models import GEMMA2, GEMMA3, with_head_scale

CONTAINERS = [
    ("onnx", "int4"),
    ("onnx", "int4-asym"),
    ("onnx", "mixed"),
    ("onnx", "int8"),
    ("executorch", "int4"),
    ("coreml", "int4"),
    ("coreml", "int4-asym"),
    ("coreml", "mixed"),
    ("coreml", "int8"),
    ("coreml", "int8-channel"),
    ("gguf", "int4"),
    ("gguf", "int8"),
    ("hf", "int4"),
    ("hf", "int8"),
    ("hf", "int8-channel"),
]


TINIES = (with_head_scale(GEMMA2), GEMMA3)


@pytest.fixture(scope="module", params=TINIES, ids=lambda tiny: tiny.name)
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TinyCheckpoint:
    """Replaces the shared fixture. down_proj has 160 inputs: five groups, an odd number."""
    return saved(request.param, tmp_path_factory)


def exported(export: Export, tiny: TinyCheckpoint, target: str, quant: str) -> Bundle:
    pytest.importorskip({"executorch": "executorch", "coreml": "coremltools"}.get(target, "onnx"))
    return export(tiny.folder, quant, target=target, prefill=8)


@pytest.mark.parametrize(("target", "quant"), CONTAINERS)
def test_every_bundle_contains_the_store_s_codes(
    tiny: TinyCheckpoint, export: Export, target: str, quant: str
) -> None:
    store = open_or_build_store(tiny.open(), find_recipe(quant))
    bundle = exported(export, tiny, target, quant)
    assert codes_digest(bundle) == store.codes_digest == bundle.manifest.quantization.codes_digest


@pytest.mark.parametrize("target", ["onnx", "executorch", "coreml"])
def test_one_altered_code_is_detected(
    tiny: TinyCheckpoint, export: Export, tmp_path: Path, target: str
) -> None:
    bundle = exported(export, tiny, target, "int4")
    copytree(bundle.directory, tmp_path / "altered")
    store = open_or_build_store(tiny.open(), find_recipe("int4"))
    name = "model.layers.1.mlp.down_proj.weight"
    codes = store.weight(name).codes(0, store.shapes[name][0]).codes.numpy()
    stored = (codes ^ 0x88 if target == "coreml" else codes).tobytes()
    (file,) = (
        f for f in (tmp_path / "altered").rglob("*") if f.is_file() and stored in f.read_bytes()
    )
    file.write_bytes(file.read_bytes().replace(stored, stored[:-1] + bytes([stored[-1] ^ 1])))
    altered = Bundle(tmp_path / "altered", bundle.manifest)
    assert codes_digest(altered) != codes_digest(bundle)
    with pytest.raises(BundleError, match="its manifest says"):
        compare_bundles([bundle, altered])


def test_bundles_of_all_targets_contain_the_same_codes(
    tiny: TinyCheckpoint, export: Export
) -> None:
    targets = ("onnx", "executorch", "coreml", "gguf", "hf")
    bundles = [exported(export, tiny, target, "int4") for target in targets]
    compared = compare_bundles(bundles)
    assert compared.same_codes
    assert len({inspection.codes_held for inspection in compared.bundles}) == 1
    assert compared.bundles[0].codes_held is not None


def test_float_weights_have_no_codes(tiny: TinyCheckpoint, export: Export) -> None:
    assert codes_digest(export(tiny.folder, "none")) is None


def test_a_truncated_file_or_another_file_type_is_refused(
    tiny: TinyCheckpoint, export: Export, tmp_path: Path
) -> None:
    bundle = export(tiny.folder, "int4", target="gguf")
    content = (bundle.directory / "model.gguf").read_bytes()
    for damaged in (content[: len(content) // 2], content[:100], b"GGML" + content[4:]):
        (tmp_path / "bad.gguf").write_bytes(damaged)
        with pytest.raises(BundleError, match=r"cut off|is not a GGUF file"):
            list(read_gguf_codes(tmp_path / "bad.gguf"))
