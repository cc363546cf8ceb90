"""Packed weights: the same answers from a mapped file, for this bundle and machine only."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from packaging.version import Version

from gemma_export.cache_command import find_entries
from gemma_export.cli import run as run_export
from gemma_runtime.backends import packed
from gemma_runtime.backends.packed import find_packed, pack_weights
from gemma_runtime.bundle import Bundle, open_bundle
from gemma_runtime.cli import run_command
from gemma_runtime.errors import SessionError
from gemma_runtime.session import Session, open_session

pytestmark = pytest.mark.skipif(
    Version(onnxruntime.__version__) < Version("1.32"),
    reason="NOT TESTED: older versions read packed weights wrongly, and are refused",
)
TINY = Path(__file__).parents[2] / "data" / "tiny"
TOKENS = [2, *range(10, 80)]  # past the caches of 72 slots
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_EXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bundle() -> Bundle:
    return open_bundle(TINY)


def answers(session: Session) -> np.ndarray:
    """Logits after a prompt in chunks, after single tokens, and of every position of a text."""
    rows = [session.prefill(TOKENS), *(session.decode(token) for token in (5, 6, 7))]
    session.reset()
    return np.vstack([*rows, session.score(TOKENS)])


def test_sessions_map_the_packed_file_and_answer_bit_for_bit_alike(
    bundle: Bundle, cache: Path
) -> None:
    with open_session(bundle, threads=1) as session:
        expected = answers(session)
        assert str(cache) not in _mappings()
    path = Path(pack_weights(bundle).path)
    with open_session(bundle, threads=1) as session:
        assert np.array_equal(answers(session), expected)
        assert str(path / "model.onnx.data") in _mappings()


def test_the_file_holds_every_packed_matrix(bundle: Bundle, cache: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(Path(pack_weights(bundle).path) / "model.onnx", load_external_data=False)
    matrices = {n.input[1] for n in model.graph.node if n.op_type == "MatMulNBits"}
    saved = {
        tensor.name
        for tensor in model.graph.initializer
        if any(entry.key.startswith("prepacked") for entry in tensor.external_data)
    }
    assert len(matrices) >= 9
    assert matrices <= saved


def test_the_graph_with_float_activations_is_not_packed(bundle: Bundle, cache: Path) -> None:
    pack_weights(bundle)
    assert find_packed(bundle, "exact") is None
    with open_session(bundle, threads=1, exact=True) as session:
        session.prefill(TOKENS)
        assert str(cache) not in _mappings()


def test_packing_again_changes_nothing(bundle: Bundle, cache: Path) -> None:
    path = Path(pack_weights(bundle).path)
    before = (path / "model.onnx.data").stat()
    assert pack_weights(bundle).path == str(path)
    assert (path / "model.onnx.data").stat().st_mtime_ns == before.st_mtime_ns


def test_another_bundle_processor_or_runtime_has_a_file_of_its_own(
    bundle: Bundle, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_weights(bundle)
    copy = tmp_path / "copy"
    shutil.copytree(TINY, copy)
    assert find_packed(open_bundle(copy), "decode") is not None  # the same bundle elsewhere
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"eos_token": 3}))
    assert find_packed(open_bundle(copy), "decode") is None
    for place, name in ((packed, "processor_name"), (onnxruntime, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, "1.99.0" if place is onnxruntime else lambda: "another")
            assert find_packed(bundle, "decode") is None
    assert find_packed(bundle, "decode") is not None


def test_a_failed_packing_leaves_nothing(
    bundle: Bundle, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(TINY, copy)
    opened = open_bundle(copy)
    (copy / opened.manifest.graph("decode").file).write_bytes(b"damaged")
    with pytest.raises(SessionError, match=r"onnxruntime .* can't pack"):
        pack_weights(opened)
    assert list((cache / "packed").iterdir()) == []


def test_other_answers_are_refused_and_nothing_is_kept(
    bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions gave some, which is why packing compares."""
    genuine = packed._answers

    def answers(bundle: Bundle, path: Path, is_packed: bool) -> np.ndarray:
        logits = genuine(bundle, path, is_packed)
        logits[-1, 0] += is_packed * 1e-3
        return logits

    monkeypatch.setattr(packed, "_answers", answers)
    with pytest.raises(SessionError, match="gives other logits with packed weights"):
        pack_weights(bundle)
    assert list((cache / "packed").iterdir()) == []


def test_older_versions_are_refused(
    bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.0")
    with pytest.raises(SessionError, match=r"onnxruntime 1.31.0 reads packed weights wrongly"):
        pack_weights(bundle)


def test_too_little_room_is_refused_before_anything_is_written(
    bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(TINY)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SessionError, match=r"packing needs up to .* free some, or set GEMMA_EX"):
        pack_weights(bundle)
    assert list((cache / "packed").iterdir()) == []


def test_the_command_packs_and_the_cache_command_lists_and_removes(
    cache: Path, capsys: Captured
) -> None:
    assert run_command(["pack", str(TINY), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (entry,) = find_entries(cache)
    assert (str(entry.path), entry.bytes) == (result["path"], result["bytes"])
    assert (entry.kind, entry.recipe) == ("packed", open_bundle(TINY).manifest.quantization.recipe)
    assert run_command(["pack", str(TINY)]) == 0
    assert "sessions of it now map this file" in capsys.readouterr().out
    assert run_export(["cache", "remove", entry.key]) == 0
    assert find_packed(open_bundle(TINY), "decode") is None


def test_bundles_of_other_targets_are_refused(bundle: Bundle, cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(TINY, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["target"]["name"] = "gguf"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SessionError, match="is for gguf; only weights of ONNX bundles are packed"):
        pack_weights(open_bundle(copy))


def _mappings() -> str:
    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux tells what a process maps")
    return Path("/proc/self/maps").read_text()
