"""Names with other beginnings, tensors that nobody reads, heads with and without a table."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gemma_export.checkpoint.folder import open_folder
from gemma_export.model.config import HEAD, TABLE
from gemma_runtime.errors import CheckpointError
from tests.field.folders import (
    Tensors,
    change,
    check_same,
    config_of,
    configure,
    transformers_logits,
)

UP = "model.layers.1.mlp.up_proj.weight"


def renamed(content: Tensors, name: Callable[[str], str]) -> None:
    for old in list(content):
        content[name(old)] = content.pop(old)


@pytest.mark.parametrize(
    "prefix",
    ["", "module.model.", "_orig_mod.model.", "base_model.model.model.", "language_model.model.",
     "model.language_model.", "model.text_model."],
)  # fmt: skip
def test_names_with_another_beginning_or_none_are_read(folder: Path, prefix: str) -> None:
    expected = transformers_logits(folder)
    change(folder, lambda t: renamed(t, lambda n: prefix + n.removeprefix("model.")))
    checkpoint = open_folder(folder)
    check_same(checkpoint, expected)
    assert checkpoint.notes == ()


def test_two_text_models_are_refused_by_their_names(folder: Path) -> None:
    def double(content: Tensors) -> None:
        renamed(content, lambda n: "draft." + n)
        content |= {n.replace("draft", "main"): t for n, t in list(content.items())}

    change(folder, double)
    with pytest.raises(CheckpointError, match=r"two text models.*draft\.model\.layers"):
        open_folder(folder)


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.float64, torch.uint32, torch.float8_e4m3fn, torch.bool, torch.int16],
    ids=str,
)
def test_a_buffer_of_any_dtype_is_no_obstacle(folder: Path, dtype: torch.dtype) -> None:
    buffer = torch.zeros(4).to(dtype)
    change(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": buffer}))
    checkpoint = open_folder(folder)
    check_same(checkpoint, transformers_logits(folder))
    assert checkpoint.notes == ()


def test_extra_heads_are_left_out_with_a_note(folder: Path) -> None:
    """A value head of a trainer; older files also hold biases that the model does not have."""
    extra = {"v_head.summary.weight": torch.zeros(1, 128), "score.weight": torch.zeros(1, 128)}
    change(folder, lambda t: t.update(extra))
    checkpoint = open_folder(folder)
    check_same(checkpoint, transformers_logits(folder))
    (note,) = checkpoint.notes
    assert "2 tensors that a causal Gemma does not use, left out, e.g. score.weight" in note


def test_a_vision_tower_is_counted_only_if_it_is_there(folder: Path) -> None:
    text = {**config_of(folder), "model_type": "gemma3_text"}
    configure(folder, model_type="gemma3", text_config=text, architectures=None)
    assert open_folder(folder).notes[0].endswith("only its text model is exported")
    change(folder, lambda t: t.update({"vision_tower.x.weight": torch.zeros(2).long()}))
    assert open_folder(folder).notes[0].endswith("without its 1 tensor for images or sound")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int64, torch.uint8, torch.float8_e4m3fn], ids=str
)
def test_a_weight_of_a_wrong_dtype_is_refused_by_name(folder: Path, dtype: torch.dtype) -> None:
    change(folder, lambda t: t.update({UP: t[UP].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"tensor {UP} is .*, expected one of F32"):
        open_folder(folder)


@pytest.mark.parametrize("part", ["qweight", "weight_scale", "weight.absmax"])
def test_packed_weights_without_their_config_are_refused(folder: Path, part: str) -> None:
    change(folder, lambda t: t.update({UP.replace("weight", part): torch.zeros(4)}))
    with pytest.raises(CheckpointError, match="is part of a quantized matrix, but"):
        open_folder(folder)


def test_adapters_inside_a_model_are_refused_by_name(folder: Path) -> None:
    lora = {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, 128)}
    change(folder, lambda t: t.update(lora))
    with pytest.raises(CheckpointError, match=r"lora_A\.default\.weight is part of an adapter"):
        open_folder(folder)


def own_head(content: Tensors) -> None:
    content[HEAD] = content[TABLE].flip(0)


def test_a_head_of_its_own_is_read(folder: Path) -> None:
    change(folder, own_head)
    configure(folder, tie_word_embeddings=False)
    checkpoint = open_folder(folder)
    check_same(checkpoint, transformers_logits(folder))
    assert not checkpoint.config.tied
    assert checkpoint.notes == ()


def test_a_head_that_differs_is_its_own_although_the_config_ties_it(folder: Path) -> None:
    """As in transformers, which warns."""
    change(folder, own_head)
    checkpoint = open_folder(folder)
    check_same(checkpoint, transformers_logits(folder))
    (note,) = checkpoint.notes
    assert f"{HEAD} differs from {TABLE}, so the model has a head of its own" in note


@pytest.mark.parametrize("tied", [True, False])
def test_an_equal_head_is_tied_whatever_the_config_says(folder: Path, tied: bool) -> None:
    change(folder, lambda t: t.update({HEAD: t[TABLE].clone()}))
    configure(folder, tie_word_embeddings=tied)
    checkpoint = open_folder(folder)
    check_same(checkpoint, transformers_logits(folder))
    assert checkpoint.config.tied
    assert checkpoint.notes == ()


def test_a_head_without_a_table_is_the_table(folder: Path) -> None:
    change(folder, lambda t: t.update({HEAD: t.pop(TABLE)}))
    check_same(open_folder(folder), transformers_logits(folder))


def test_an_untied_model_without_its_head_or_its_table_is_refused(folder: Path) -> None:
    configure(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"but lm_head\.weight is missing"):
        open_folder(folder)
    change(folder, lambda t: t.update({HEAD: t.pop(TABLE)}))
    with pytest.raises(CheckpointError, match=f"tensor {TABLE} is missing"):
        open_folder(folder)


def test_a_head_of_another_shape_is_refused(folder: Path) -> None:
    change(folder, lambda t: t.update({HEAD: t[TABLE][:-1]}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape"):
        open_folder(folder)


def test_the_head_of_a_multimodal_folder_is_read(folder: Path) -> None:
    text = {**config_of(folder), "model_type": "gemma3_text"}
    configure(folder, model_type="gemma3", text_config=text, architectures=None,
              tie_word_embeddings=False)  # fmt: skip
    change(folder, own_head)
    assert not open_folder(folder).config.tied
