"""Bundles whose digests are right and whose content means harm."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_runtime.bundle import describe_files, open_bundle
from gemma_runtime.contents.held_codes import codes_digest
from gemma_runtime.errors import BundleError, SessionError
from gemma_runtime.session import open_session
from tests.fuzz.reader import TINY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "bundle"))


def _edit(folder: Path, edit: Callable[[Any], object]) -> None:
    """Change the manifest, and make its digests right again."""
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    for name, file in describe_files(folder).items():
        manifest["files"][name] = {"sha256": file.sha256, "bytes": file.bytes}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _set_layer(**fields: object) -> Callable[[Any], object]:
    return lambda manifest: manifest["layers"][0].update(fields)


def _set_state(**fields: object) -> Callable[[Any], object]:
    return lambda manifest: manifest["graphs"]["decode"][0]["states"][0].update(fields)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(vocab_size=2**50), "vocab_size is 1125899906842624, expected 1 to"),
        (lambda m: m.update(context_length=-1), "context_length is -1"),
        (lambda m: m.update(prefill_length=0), "prefill_length is 0"),
        (_set_layer(slots=2**40), "layer 0: its cache has the sizes"),
        (_set_layer(head_dim=-32), "layer 0: its cache has the sizes"),
        (_set_layer(slots=7), "layer 0: its cache has 7 slots"),
        (_set_layer(window=0), "its window is 0"),
        (_set_layer(source=0), "it reads the cache of layer 0, expected an earlier one"),
        (_set_state(shape=[2**20, 2**20]), "past_key_0' has the shape"),
        (_set_state(shape=[1, 2, -1, 32]), "past_key_0' has the shape"),
        (_set_state(dtype="object"), "is 'object', expected one of float32"),
    ],
)
def test_sizes_beyond_reason_are_refused_before_anything_is_allocated(
    folder: Path, edit: Callable[[Any], object], message: str
) -> None:
    """They ended in MemoryError and other tracebacks when the caches were made."""
    _edit(folder, edit)
    with pytest.raises(BundleError, match=f"manifest.json is not valid: .*{message}"):
        open_bundle(folder)


def test_a_graph_that_does_not_fit_its_manifest_is_one_line(folder: Path) -> None:
    _edit(folder, _set_state(shape=[1, 2, 72, 16]))
    with open_session(open_bundle(folder)) as session, pytest.raises(SessionError) as caught:
        session.prefill([2, 3])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("is_absolute", [False, True])
def test_weights_outside_of_the_bundle_are_not_read(folder: Path, is_absolute: bool) -> None:
    """The graph says where its data are, and it may say any file of the machine."""
    onnx = pytest.importorskip("onnx")
    outside = folder.parent / "secret"
    shutil.copy(folder / "model.onnx.data", outside)
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(outside) if is_absolute else "../secret"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    _edit(folder, lambda manifest: None)
    bundle = open_bundle(folder)
    with pytest.raises(BundleError, match="which is not in the manifest"):
        codes_digest(bundle)
    with pytest.raises(SessionError, match="can't load"):
        open_session(bundle)
