"""Checkpoint folders: reading safetensors, shards and configs, and refusing bad ones."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gemma_export.checkpoint.folder import open_folder
from gemma_export.checkpoint.open import open_checkpoint
from gemma_export.checkpoint.random import RandomCheckpoint
from gemma_export.formats.safetensors import SafetensorsFile
from gemma_export.model.sizes import find_official
from gemma_runtime.errors import CheckpointError, ConfigError
from tests.export.models import GEMMA3, save_tiny

NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_tiny(GEMMA3, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> dict[str, str]:
    """Split the checkpoint into two shards with an index file."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {name: file for file, part in files.items() for name in part}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: dict[str, str]) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))


def test_rows_are_read_from_the_file(folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")[NAME]
    checkpoint = open_folder(folder)
    assert torch.equal(checkpoint.rows(NAME, 3, 17), expected[3:17])


def test_shards_give_the_same_rows_as_one_file(folder: Path, saved: Path) -> None:
    shard(folder)
    one, two = open_folder(saved), open_folder(folder)
    assert torch.equal(one.rows(NAME, 0, 9), two.rows(NAME, 0, 9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_to_float32_exactly(folder: Path, dtype: torch.dtype) -> None:
    change(folder, lambda t: t.update({NAME: t[NAME].to(dtype)}))
    expected = load_file(folder / "model.safetensors")[NAME].float()
    assert torch.equal(open_folder(folder).rows(NAME, 0, len(expected)), expected)


def test_a_multimodal_folder_gives_its_text_model_and_a_note(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))

    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("model.", "language_model.model.", 1)] = tensors.pop(name)
        tensors["vision_tower.patch.weight"] = torch.zeros(2)

    expected = load_file(folder / "model.safetensors")[NAME]
    change(folder, wrap)
    checkpoint = open_folder(folder)
    assert torch.equal(checkpoint.rows(NAME, 0, 5), expected[:5])
    assert "without its 1 tensor for images or sound" in checkpoint.notes[0]


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop(NAME), f"tensor {NAME} is missing"),
        (lambda t: t.update({NAME: torch.zeros(3, 3)}), r"has shape \(3, 3\), the config says"),
        (lambda t: t.update({NAME: t[NAME].int()}), "is I32, expected one of"),
    ],
    ids=["missing", "shape", "dtype"],
)
def test_the_error_for_a_wrong_tensor_names_it(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], match: str
) -> None:
    change(folder, edit)
    with pytest.raises(CheckpointError, match=match):
        open_folder(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused_when_their_rows_are_read(folder: Path, value: float) -> None:
    change(folder, lambda t: t[NAME][2].fill_(value))
    checkpoint = open_folder(folder)
    checkpoint.rows(NAME, 0, 2)
    with pytest.raises(CheckpointError, match=f"{NAME} contains NaN or Inf"):
        checkpoint.rows(NAME, 0, 3)


@pytest.mark.parametrize("bad", ["../b.safetensors", "/etc/passwd", "sub/b.safetensors", ".."])
def test_an_index_that_points_outside_the_folder_is_refused(folder: Path, bad: str) -> None:
    index = shard(folder)
    write_index(folder, {**index, NAME: bad})
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_folder(folder)


def test_a_missing_shard_and_a_pickled_shard_are_refused(folder: Path) -> None:
    index = shard(folder)
    write_index(folder, {**index, NAME: "c.safetensors"})
    with pytest.raises(CheckpointError, match=r"shard c\.safetensors is missing"):
        open_folder(folder)
    write_index(folder, {**index, NAME: "pytorch_model.bin"})
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_folder(folder)


def test_pickles_and_quantized_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="can run code"):
        open_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="already quantized"):
        open_folder(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_file_opens_or_gives_a_checkpoint_error(
    folder: Path, data: st.DataObject
) -> None:
    """Truncated anywhere, or with changed bytes in the header: no other exception is raised."""
    path = folder / "damaged.safetensors"
    content = bytearray((folder / "model.safetensors").read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            index = data.draw(st.integers(0, min(len(content), 3000) - 1))
            content[index] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with suppress(CheckpointError):
        SafetensorsFile(path)


def test_a_huge_header_length_is_refused_before_allocating(tmp_path: Path) -> None:
    path = tmp_path / "absurd.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="header claims"):
        SafetensorsFile(path)


def test_random_rows_are_the_same_in_one_read_or_several() -> None:
    checkpoint = RandomCheckpoint(find_official("2b").config, 3)
    rows = checkpoint.rows(NAME, 0, 200)
    assert torch.equal(
        torch.cat([checkpoint.rows(NAME, 0, 70), checkpoint.rows(NAME, 70, 200)]), rows
    )
    assert not torch.equal(RandomCheckpoint(checkpoint.config, 4).rows(NAME, 0, 200), rows)
    assert rows.std() == pytest.approx(2304**-0.5, rel=0.01)


@pytest.mark.parametrize(
    ("source", "size", "match"),
    [
        ("random:x", "2b", "not a number"),
        ("random", None, "need a shape"),
        ("nowhere/at/all", None, "not a hub id"),
        (None, None, "give --size"),
    ],
)
def test_a_source_that_is_not_a_checkpoint_is_refused(
    source: str | None, size: str | None, match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(source, size)


def test_a_size_that_contradicts_the_checkpoint_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="7 layers of width 128; gemma2 2b has 26 of 2304"):
        open_checkpoint(str(folder), "2b")


def test_a_revision_belongs_to_a_checkpoint_on_the_hub(tmp_path: Path) -> None:
    for source in (str(tmp_path), "random:7", "demo"):
        with pytest.raises(CheckpointError, match="is not on the hub, so it has no --revision"):
            open_checkpoint(source, revision="v1")


def test_a_page_and_a_flag_that_name_two_revisions_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"--revision is v1, but .* names v2"):
        open_checkpoint("https://huggingface.co/a/b/tree/v2", revision="v1")
