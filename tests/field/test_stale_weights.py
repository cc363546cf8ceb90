"""Several sets of weights in one folder: transformers' choice is read, or the folder is refused."""

from pathlib import Path

import pytest

from gemma_export.checkpoint.folder import open_folder
from gemma_runtime.errors import CheckpointError
from tests.field.folders import (
    INDEX,
    SINGLE,
    check_same,
    configure,
    save,
    shard,
    tensors,
    transformers_logits,
)


def test_a_new_single_file_wins_over_older_shards_and_their_index(folder: Path) -> None:
    new = tensors(folder)
    shard(folder, {name: value * 1.5 for name, value in new.items()})
    checkpoint = open_folder(folder)
    check_same(checkpoint, transformers_logits(folder))
    (note,) = checkpoint.notes
    assert f"the weights are those of {SINGLE}; left aside: model-00001-of-00002" in note
    assert INDEX in note


def test_a_backup_beside_the_single_file_is_left_aside(folder: Path) -> None:
    save(folder, {n: v * 2 for n, v in tensors(folder).items()}, "model_backup.safetensors")
    checkpoint = open_folder(folder)
    check_same(checkpoint, transformers_logits(folder))
    assert "left aside: model_backup.safetensors" in checkpoint.notes[0]


def test_shards_that_the_index_does_not_list_are_left_aside(folder: Path) -> None:
    old = {name: value * 2 for name, value in tensors(folder).items()}
    shard(folder, tensors(folder))
    (folder / SINGLE).unlink()
    save(folder, old, "model-00003-of-00003.safetensors")
    checkpoint = open_folder(folder)
    check_same(checkpoint, transformers_logits(folder))
    assert f"those of {INDEX}; left aside: model-00003-of-00003" in checkpoint.notes[0]


@pytest.mark.parametrize("index", [None, "old.index.json"], ids=["no index", "renamed index"])
def test_shards_without_their_index_are_read(folder: Path, index: str | None) -> None:
    expected = transformers_logits(folder)
    shard(folder, tensors(folder), index)
    (folder / SINGLE).unlink()
    checkpoint = open_folder(folder)
    check_same(checkpoint, expected)
    assert checkpoint.notes == ()


def test_a_tensor_in_two_files_is_refused_by_both_names(folder: Path) -> None:
    content = tensors(folder)
    (folder / SINGLE).rename(folder / "a.safetensors")
    save(folder, content, "b.safetensors")
    with pytest.raises(CheckpointError, match=r"is in both a\.safetensors and b\.safetensors"):
        open_folder(folder)


def test_the_file_that_the_config_names_is_read(folder: Path) -> None:
    save(folder, {n: v * 1.5 for n, v in tensors(folder).items()}, "best.safetensors")
    configure(folder, transformers_weights="best.safetensors")
    checkpoint = open_folder(folder)
    check_same(checkpoint, transformers_logits(folder))
    assert "those of best.safetensors; left aside: model.safetensors" in checkpoint.notes[0]
