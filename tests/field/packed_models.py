"""Tiny Gemmas with quantized projections, and what our reader and transformers make of them."""

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
from gemma_export.quantize.kept import resolve_recipe
from gemma_export.quantize.recipe import find_recipe
from gemma_export.quantize.store import QuantizedStore, open_or_build_store
from tests.export.models import SHORT_GEMMA3, eager_logits, save_tiny, untied

TOKENS = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(3)).tolist()
UP = "model.layers.0.mlp.up_proj.weight"
Packer = Callable[[str, Tensor], dict[str, Tensor]]  # (module, weight) → its tensors, by part


def save_packed(
    folder: Path,
    fields: Mapping[str, Any],
    pack: Packer,
    table: bool = False,
    head: bool = False,
) -> None:
    """Write a tiny Gemma whose projections, and table on request, are replaced by packed tensors.

    With `head`, it has a head of its own, which is packed too.

    `fields` are added to `config.json`.
    """
    save_tiny(untied(SHORT_GEMMA3) if head else SHORT_GEMMA3, folder)
    path = folder / "model.safetensors"
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(path).items():
        module = name.removesuffix(".weight")
        if "_proj" in name or "lm_head" in name or (table and "embed_tokens" in name):
            parts = pack(module, tensor)
            tensors |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def our_logits(checkpoint: Checkpoint) -> Tensor:
    """Logits of the float32 reference at every position: (T, V)."""
    config = checkpoint.config
    shapes = config.tensor_shapes()
    ops = TorchOps(torch.tensor([TOKENS]), config.rms_norm_eps)
    with torch.inference_mode():
        return decoder(ops, config, lambda n: SourceWeight(n, shapes[n], checkpoint))[0]


def their_logits(folder: Path, **loading: Any) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **loading
    )
    model.train(False)
    return eager_logits(model, TOKENS)


def all_rows(checkpoint: Checkpoint, name: str = UP) -> Tensor:
    return checkpoint.rows(name, 0, checkpoint.config.tensor_shapes()[name][0])


def source_store(checkpoint: Checkpoint) -> QuantizedStore:
    """The store of `--quant source`."""
    recipe = resolve_recipe(find_recipe("source"), checkpoint).recipe
    return open_or_build_store(checkpoint, recipe)


def rounded(checkpoint: Checkpoint) -> Mapping[str, str]:
    """The matrices that `--quant source` rounds, and their kinds."""
    return resolve_recipe(find_recipe("source"), checkpoint).rounded
