"""Folders and files that people give although the checkpoint is elsewhere, partial or missing."""

import json
from pathlib import Path

import pytest

from gemma_export.checkpoint.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, open_adapter
from gemma_export.checkpoint.folder import open_folder
from gemma_export.checkpoint.gguf import GgufCheckpoint
from gemma_export.checkpoint.open import open_checkpoint
from gemma_export.quantize.recipe import find_recipe
from gemma_export.request import ExportRequest, plan_exports
from gemma_runtime.bundle import MANIFEST, staged_folder
from gemma_runtime.errors import BundleError, CheckpointError
from tests.export.gguf_files import write_tiny
from tests.field.folders import SINGLE, configure, shard, tensors

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4242\n"
NAMES = (SINGLE, "tokenizer.json", "tokenizer.model", "config.json")


@pytest.mark.parametrize("name", NAMES)
def test_a_git_lfs_pointer_is_named_with_what_to_run(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer, run git lfs pull"):
        open_folder(folder)


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
def test_an_adapter_file_that_is_a_git_lfs_pointer_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / ADAPTER_CONFIG).write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer, run git lfs pull"):
        open_adapter(tmp_path)


def test_a_gguf_file_that_is_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text(POINTER)
    for source in (path, tmp_path):
        with pytest.raises(CheckpointError, match=r"model\.gguf is a Git LFS pointer"):
            open_checkpoint(str(source))


@pytest.mark.parametrize("name", NAMES)
def test_a_link_of_a_hub_snapshot_without_its_blob_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/0123")
    with pytest.raises(CheckpointError, match=f"{name} is a broken link to ../../blobs/0123"):
        open_checkpoint(str(folder))


def test_a_broken_link_to_a_shard_is_named(folder: Path) -> None:
    shard(folder, tensors(folder))
    (folder / SINGLE).unlink()
    first = folder / "model-00001-of-00002.safetensors"
    first.unlink()
    first.symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors is a broken"):
        open_folder(folder)


def test_the_folder_above_a_trainers_checkpoints_names_the_newest(folder: Path) -> None:
    above = folder.parent
    for step in (500, 1000, 90):
        (above / f"checkpoint-{step}").mkdir()
        (above / f"checkpoint-{step}" / "config.json").write_text("{}")
    folder.rename(folder.parent.parent / f"{above.name}-moved")
    with pytest.raises(CheckpointError, match=r"but .*/checkpoint-1000 is a checkpoint; give that"):
        open_checkpoint(str(above))


def test_a_quantization_config_of_null_is_none(folder: Path) -> None:
    configure(folder, quantization_config=None)
    assert open_folder(folder).notes == ()


@pytest.mark.parametrize("name", ["model.gguf", "sha256-0123", "model.bin"])
def test_a_gguf_file_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    path = write_tiny(tmp_path).rename(tmp_path / name)
    assert isinstance(open_checkpoint(str(path)), GgufCheckpoint)


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    (tmp_path / "mmproj-model-f16.gguf").write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    assert open_checkpoint(str(tmp_path)).id == "model.gguf"
    (tmp_path / "config.json").unlink()
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 GGUF models: model\.gguf, other\.gguf"):
        open_checkpoint(str(tmp_path))


def test_one_file_of_a_folder_names_the_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is one file of a checkpoint; give its folder"):
        open_checkpoint(str(folder / SINGLE))


def test_an_empty_output_is_filled_and_any_other_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with staged_folder(output) as stage:
        (stage / MANIFEST).write_text("{}")
    assert (output / MANIFEST).exists()
    with pytest.raises(BundleError, match="exists; give another --output"), staged_folder(output):
        pass


def test_a_plan_reads_the_config_of_a_folder_with_stale_shards(folder: Path) -> None:
    shard(folder, tensors(folder))
    (plan,) = plan_exports(ExportRequest(("onnx",), find_recipe("int4"), str(folder)))
    assert plan.parameters.table == 96 * 128
