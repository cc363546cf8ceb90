"""Kinds that come together: any layout with any names, dtype, head and place of the template."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_export.checkpoint.folder import open_folder
from gemma_export.model.config import HEAD, TABLE
from tests.field.folders import (
    INDEX,
    SINGLE,
    Tensors,
    check_same,
    configure,
    save,
    shard,
    tensors,
    transformers_logits,
)
from tests.runtime.conftest import small_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def with_stale_shards(folder: Path, content: Tensors) -> None:
    shard(folder, {name: value + 1 for name, value in content.items()})
    save(folder, content)


def with_backup(folder: Path, content: Tensors) -> None:
    save(folder, {name: value - 1 for name, value in content.items()}, "model_backup.safetensors")
    save(folder, content)


LAYOUTS: dict[str, Callable[[Path, Tensors], None]] = {
    "one file": save,
    "shards and index": shard,
    "shards alone": lambda folder, content: shard(folder, content, index=None),
    "stale shards beside one file": with_stale_shards,
    "a backup beside one file": with_backup,
}
PREFIXES = ("model.", "", "module.model.", "language_model.model.", "base_model.model.model.")
TEMPLATES = {
    "chat_template.jinja": TEMPLATE,
    "chat_template.json": json.dumps({"chat_template": TEMPLATE}),
    "tokenizer_config.json": json.dumps(
        {
            "chat_template": [
                {"name": "rag", "template": "x"},
                {"name": "default", "template": TEMPLATE},
            ]
        }
    ),
}


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS: dict[str, Callable[[torch.Tensor], dict[str, torch.Tensor]]] = {
    "no head": lambda table: {},
    "an equal head": lambda table: {HEAD: table.clone()},
    "a head of its own": lambda table: {HEAD: table.flip(0)},
}
Logits = dict[tuple[torch.dtype, str], torch.Tensor]


def with_head(content: Tensors, dtype: torch.dtype, head: str) -> Tensors:
    rounded = {name: value.to(dtype) for name, value in content.items()}
    return {**rounded, **HEADS[head](rounded[TABLE])}


@pytest.fixture(scope="module")
def expected(saved: Path) -> Logits:
    """transformers' logits of the plain folder, with weights rounded to each dtype."""
    logits = {}
    for dtype, head in itertools.product(DTYPES, HEADS):
        with TemporaryDirectory() as place:
            folder = Path(shutil.copytree(saved, Path(place) / "model"))
            save(folder, with_head(tensors(saved), dtype, head))
            logits[dtype, head] = transformers_logits(folder)
    return logits


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    prefix=st.sampled_from(PREFIXES),
    dtype=st.sampled_from(DTYPES),
    head=st.sampled_from(sorted(HEADS)),
    says_tied=st.sampled_from([True, False, None]),
    place=st.sampled_from(sorted(TEMPLATES)),
)
def test_any_mix_is_read_as_the_plain_folder_is(
    saved: Path,
    expected: Logits,
    layout: str,
    prefix: str,
    dtype: torch.dtype,
    head: str,
    says_tied: bool | None,
    place: str,
) -> None:
    with TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(saved, Path(scratch) / "model"))
        (folder / SINGLE).unlink()
        content = {
            prefix.removesuffix("model.") + name
            if name == HEAD
            else prefix + name.removeprefix("model."): value
            for name, value in with_head(tensors(saved), dtype, head).items()
        }
        if head != "no head" and says_tied is not None:
            configure(folder, tie_word_embeddings=says_tied)
        LAYOUTS[layout](folder, content)
        small_tokenizer().save(str(folder / "tokenizer.json"))
        (folder / place).write_text(TEMPLATES[place], "utf-8")

        checkpoint = open_folder(folder)
        files = checkpoint.tokenizer()

        check_same(checkpoint, expected[dtype, head])
        assert checkpoint.config.tied == (head != "a head of its own")
        assert files is not None
        assert files.chat_template == TEMPLATE
        has_stale = layout in ("stale shards beside one file", "a backup beside one file")
        assert any("left aside" in note for note in checkpoint.notes) == has_stale
        assert (folder / INDEX).exists() == (
            layout in ("shards and index", "stale shards beside one file")
        )
