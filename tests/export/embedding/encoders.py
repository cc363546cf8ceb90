"""Tiny EmbeddingGemmas with random weights, saved as sentence-transformers folders."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, Gemma3TextConfig, Gemma3TextModel, PreTrainedModel
from transformers.models.embedding_gemma2 import EmbeddingGemma2TextConfig
from transformers.models.embedding_gemma2.modeling_embedding_gemma2 import EmbeddingGemma2TextModel

from tests.export.models import Tiny

QUERY, DOCUMENT = "task: search result | query: ", "title: none | text: "
SHARED: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,  # its square root is irrational, so a wrongly rounded scale shows
    "intermediate_size": 160,
    "max_position_embeddings": 256,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "dtype": "float32",
}
# What the config takes, but does not declare.
GLOBAL: dict[str, Any] = {"global_head_dim": 48, "num_global_key_value_heads": 1}


@dataclass(frozen=True)
class TinyEncoder:
    tiny: Tiny
    dense: tuple[int, ...]  # widths of the modules behind the model

    def save(self, folder: Path) -> Path:
        """A folder like those of sentence-transformers, without a tokenizer."""
        self.tiny.build().save_pretrained(folder)
        kinds = ["Transformer", "Pooling", *["Dense"] * len(self.dense), "Normalize"]
        modules = [
            {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"x.y.{kind}"}
            for i, kind in enumerate(kinds)
        ]
        _write(folder / "modules.json", modules)
        flags = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
        _write(folder / "1_Pooling" / "config.json", {**flags, "include_prompt": True})
        generator = torch.Generator().manual_seed(11)
        inputs = self.tiny.config.hidden_size
        for index, outputs in enumerate(self.dense, 2):
            weight = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
            identity = "torch.nn.modules.linear.Identity"
            config = {"in_features": inputs, "bias": False, "activation_function": identity}
            _write(folder / f"{index}_Dense" / "config.json", config)
            save_file({"linear.weight": weight}, folder / f"{index}_Dense" / "model.safetensors")
            inputs = outputs
        prompts = {"query": QUERY, "document": DOCUMENT}
        content = {"prompts": prompts, "default_prompt_name": None}
        _write(folder / "config_sentence_transformers.json", content)
        _write(folder / "sentence_bert_config.json", {"max_seq_length": 128})
        return folder


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


EMBEDDING_GEMMA = TinyEncoder(
    Tiny(
        "embeddinggemma",
        Gemma3TextConfig(
            sliding_window=16,  # so that a token sees 8 others on each side
            query_pre_attn_scalar=24,
            use_bidirectional_attention=True,
            **SHARED,
        ),
        Gemma3TextModel,
    ),
    dense=(256, 64),
)
EMBEDDING_GEMMA_2 = TinyEncoder(
    Tiny(
        "embeddinggemma2",
        EmbeddingGemma2TextConfig(
            sliding_window=8,
            **GLOBAL,
            hidden_size_per_layer_input=32,
            embedding_dim=64,
            layer_types=[*["sliding_attention"] * 5, "full_attention", "full_attention"],
            **SHARED,
        ),
        EmbeddingGemma2TextModel,
        plain_gains=True,
    ),
    dense=(),
)
ENCODERS = (EMBEDDING_GEMMA, EMBEDDING_GEMMA_2)


def their_vector(folder: Path, tokens: Sequence[int]) -> Tensor:
    """What transformers and the folder's modules make of tokens, (D,)."""
    model: PreTrainedModel = AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.train(False)
    with torch.inference_mode():
        x = model(input_ids=torch.tensor([list(tokens)])).last_hidden_state[0].mean(0)
        for path in sorted(folder.glob("*_Dense/model.safetensors")):
            from safetensors.torch import load_file

            x = load_file(path)["linear.weight"] @ x
    return functional.normalize(x, dim=-1)
