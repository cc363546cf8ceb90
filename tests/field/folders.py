"""A tiny Gemma as a folder that a test changes, judged by what transformers loads from it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gemma_export.checkpoint import Checkpoint, SourceWeight
from gemma_export.model.decoder import decoder
from gemma_export.model.torch_ops import TorchOps
from tests.export.models import eager_logits

PROMPT = [3 + 7 * index % 90 for index in range(40)]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Tensors = dict[str, Tensor]


def our_logits(checkpoint: Checkpoint) -> Tensor:
    config, shapes = checkpoint.config, checkpoint.config.tensor_shapes()
    ops = TorchOps(torch.tensor([PROMPT]), config.rms_norm_eps)
    with torch.inference_mode():
        return decoder(ops, config, lambda n: SourceWeight(n, shapes[n], checkpoint))[0]


def transformers_logits(folder: Path) -> Tensor:
    """The logits of the model that transformers loads from the folder."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return eager_logits(model.train(False), PROMPT)


def check_same(ours: Checkpoint, theirs: Tensor) -> None:
    assert (our_logits(ours) - theirs).abs().max() < 2e-5


def tensors(folder: Path) -> Tensors:
    return load_file(folder / SINGLE)


def save(folder: Path, content: Mapping[str, Tensor], name: str = SINGLE) -> None:
    copies = {key: value.clone().contiguous() for key, value in content.items()}
    save_file(copies, folder / name, {"format": "pt"})


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    content = tensors(folder)
    edit(content)
    save(folder, content)


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def configure(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **fields}))


def shard(folder: Path, content: Mapping[str, Tensor], index: str | None = INDEX) -> None:
    """Write two shards, and an index of this name."""
    names = sorted(content)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in files.items():
        save(folder, {name: content[name] for name in part}, file)
    if index is not None:
        places = {name: file for file, part in files.items() for name in part}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
